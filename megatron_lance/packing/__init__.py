"""Packing: segments, samples, packs, their layout, mask and positions; pure values on the CPU."""
