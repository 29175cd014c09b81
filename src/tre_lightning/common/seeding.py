"""Random numbers by key: each generator is derived from (seed, purpose, iteration, ...).

No generator state lives between iterations, so a resumed run, another micro-batch size or another
number of devices draws the same numbers.
"""

import hashlib
import os
import secrets

import torch
from torch import Tensor

from tre_lightning.common.distributed import is_first_process

_DRAWN = "TRE_LIGHTNING_SEED"  # environment: the seed that the run's first process has drawn


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


def settled_seed(given: bool | int, saved: int | None, num_nodes: int) -> int:
    """The number that ``seed_everything`` stands for, the same on all ranks.

    Args:
        given: a number is the seed; true or false has one drawn.
        saved: seed of the run that goes on, which is then taken instead of another draw.
        num_nodes: of the trainer.

    Raises:
        ValueError: where a draw is wanted, and processes that others started cannot agree on it.
    """
    if not isinstance(given, bool):
        return given
    if saved is not None:
        return saved
    if not is_first_process() and _DRAWN in os.environ:  # started by the first one
        return int(os.environ[_DRAWN])
    processes = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))
    if num_nodes > 1 or int(processes) > 1:
        raise ValueError(
            f"seed_everything={str(given).lower()} draws a seed, on which processes of several "
            "nodes, of torchrun or of SLURM cannot agree; give a number"
        )
    seed = secrets.randbelow(2**32)
    os.environ[_DRAWN] = str(seed)
    print(f"seed         {seed} (drawn; --seed_everything {seed} repeats it)", flush=True)
    return seed
