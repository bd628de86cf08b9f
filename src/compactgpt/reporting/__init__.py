"""Render the comparison's record as tables, plots, an HTML page and a model card, with Jinja2 templates."""
