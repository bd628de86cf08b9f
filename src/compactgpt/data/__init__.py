"""Text from anywhere: documents, checked, and token files made of them."""
