"""Collectives over the ranks; each is the identity on one device."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from lightning.fabric.utilities.rank_zero import _get_rank
from torch import Tensor

from tre_lightning.common.errors import RunError


def world() -> tuple[int, int]:
    """Rank and number of ranks."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first_process() -> bool:
    """Whether this is rank 0 by the launcher's environment; works before processes connect."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    return not (_get_rank() or int(node))


def gather_rows(tensor: Tensor, padding: float) -> Tensor:
    """Rows of all ranks in rank order, ``[B, ...] -> [sum of B, ...]``. Collective.

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


def highest(number: int, device: torch.device) -> int:
    """Maximum over ranks. Collective: call on all ranks."""
    if world()[1] == 1:
        return number
    numbers = torch.tensor(number, device=device)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return int(numbers)


@contextmanager
def agreed() -> Iterator[None]:
    """Context in which an error on one rank is raised on all ranks, at the end. Collective.

    All ranks must come here; no collective may follow in the block on what can fail.

    Raises:
        RunError: on every rank, that of the first one that raised such an error; or, where another
            one failed with an error of another kind, one that names it.
        Exception: the rank's own error of another kind.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    agree(failed)


def agree(error: Exception | None) -> None:
    """Raise on all ranks if one passes an error; see :func:`agreed`. Collective."""
    rank, ranks = world()
    if ranks == 1:
        if error is not None:
            raise error
        return
    own: tuple[type[RunError], str] | None = None
    if isinstance(error, RunError):
        own = type(error), str(error)
    elif error is not None:
        own = RunError, f"process {rank} of {ranks} failed: {type(error).__name__}: {error}"
    told: list[tuple[type[RunError], str] | None] = [None] * ranks
    dist.all_gather_object(told, own)
    first = next((one for one in told if one is not None), None)
    if first is None:
        return
    if error is not None and not isinstance(error, RunError):
        raise error
    kind, message = first
    common = kind(message)
    common.of_all_ranks = True
    raise common from error


def job_id() -> str | None:
    """The SLURM job of this process; a requeued job keeps its id."""
    return os.environ.get("SLURM_JOB_ID")
