"""Functions and classes that the modules of every other folder may use."""
