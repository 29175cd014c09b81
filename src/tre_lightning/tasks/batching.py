"""Split rows into batches, and a batch over ranks."""

from itertools import pairwise


def spans(count: int, size: int, ranks: int) -> list[tuple[int, int]]:
    """Start and end of the batches of ``size`` rows; every rank has a row of every batch.

    The rows left over are the last batch, or join it where they are fewer than the ranks.

    Args:
        count: rows, >= ranks.
        size: rows of a batch over all ranks; fewer than the ranks count as so many.
        ranks: number of ranks.
    """
    starts = list(range(0, count, max(size, ranks)))
    if count - starts[-1] < ranks:
        del starts[-1]
    return list(pairwise([*starts, count]))


def share(total: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and end of a rank's rows among the ``total`` rows of a batch."""
    return total * rank // ranks, total * (rank + 1) // ranks
