"""Sampling: flow-matching sampler, the model as a velocity function, pictures and clips on disk."""
