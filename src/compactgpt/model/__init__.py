"""The GPT, its training loss, its files, and its conversion to and from Hugging Face's format."""
