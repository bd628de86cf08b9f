"""Compare the models and write the tables, plots, HTML page and model card."""
