"""Compare the models, and write the comparison as tables, plots, an HTML page and a model card."""
