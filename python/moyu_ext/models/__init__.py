"""What the project knows of a Hugging Face model: its MLPs, weights, decoder, cache and text."""
