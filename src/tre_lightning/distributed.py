"""Collectives over the ranks; each is the identity on one device."""

import torch
import torch.distributed as dist
from torch import Tensor


def world() -> tuple[int, int]:
    """(rank, number of ranks)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def most(count: int) -> int:
    """The largest count of all ranks."""
    _, ranks = world()
    counts = [count] * ranks
    if ranks > 1:
        dist.all_gather_object(counts, count)
    return max(counts)


def gather_rows(tensor: Tensor, padding: float) -> Tensor:
    """Rows of all ranks in rank order, ``[B, ...] -> [sum of B, ...]``.

    Ranks may differ in B and in the other axes; those are padded at their end to the longest.
    """
    _, ranks = world()
    if ranks == 1:
        return tensor
    shapes: list[tuple[int, ...]] = [()] * ranks
    dist.all_gather_object(shapes, tuple(tensor.shape))
    common = [max(sizes) for sizes in zip(*shapes, strict=True)]
    padded = tensor.new_full(common, padding)
    padded[tuple(slice(size) for size in tensor.shape)] = tensor
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded)
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])
