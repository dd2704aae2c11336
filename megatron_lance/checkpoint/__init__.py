"""Checkpoints and the interchange with the public Hugging Face layout."""
