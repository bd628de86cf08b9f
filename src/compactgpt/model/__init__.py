"""The GPT, the loss of its head, and its conversion to and from Hugging Face's format."""
