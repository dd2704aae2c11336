"""megatron_lance: a trainer for Lance-type dual-expert multimodal models on megatron-core."""
