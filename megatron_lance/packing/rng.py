"""Addressed randomness: every random value is a function of where it is used, never of what was drawn before.

A stream is named by (seed, purpose, address...), for example (1234, "noise", sample id, epoch).  The same name gives
the same bits on every rank, layout and restart, so no RNG state is saved (design decision 5).  Bits are made on the
CPU by Philox, a counter-based generator, and then moved to the device.
"""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, purpose: str, *address: str | int) -> np.random.Generator:
    """A generator whose values depend on nothing but its name.

    Args:
        seed: the run's seed.
        purpose: what the values are for, e.g. "noise"; keeps streams of one address apart.
        address: further parts of the name, e.g. sample id and epoch.

    Returns:
        A numpy generator over Philox4x64, keyed by a 128-bit digest of the name.
    """
    name = "\x1f".join([str(seed), purpose, *(f"{type(a).__name__}:{a}" for a in address)])
    digest = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def uniform(seed: int, purpose: str, *address: str | int) -> float:
    """One float64 in [0, 1) addressed by name."""
    return float(stream(seed, purpose, *address).random())
