"""The GPT, the loss of its output layer, and its conversion to and from Hugging Face's form."""
