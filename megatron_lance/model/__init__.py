"""The model: dual-expert Megatron layers, embedder, heads."""
