"""Frozen encoders: pictures and clips in, ViT features and VAE latents out."""
