"""All randomness, derived from what it is for: (seed, purpose, iteration, ...).

No generator state lives between iterations, so a resumed run, another micro-batch size or another
number of devices draws the same numbers.
"""

import hashlib

import torch
from torch import Tensor


def derived_seed(*key: int | str) -> int:
    """A 63-bit seed from the key, the same on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def generator(*key: int | str) -> torch.Generator:
    """A fresh CPU generator for the key."""
    return torch.Generator().manual_seed(derived_seed(*key))


def uniforms(rows: int, columns: int, *key: int | str) -> Tensor:
    """Uniform numbers in [0, 1), ``[rows, columns]`` float64."""
    return torch.rand(rows, columns, dtype=torch.float64, generator=generator(*key))


def permutation(size: int, *key: int | str) -> Tensor:
    """A random order of ``range(size)``, ``[size]`` int64."""
    return torch.randperm(size, generator=generator(*key))
