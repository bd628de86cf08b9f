"""The GPT, its losses, its files, and their conversion to and from Hugging Face's format."""
