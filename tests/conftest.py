import os

# Set before typer and rich are imported: their colours would split the words that tests look for.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
