"""The data pipeline: read texts, check documents, and write token files."""
