"""The comparison's record as tables, plots, one HTML page and a model card; templates/ holds their words."""
