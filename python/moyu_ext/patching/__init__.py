"""Finding the MLPs of a model, replacing them, and keeping the state of sequences."""
