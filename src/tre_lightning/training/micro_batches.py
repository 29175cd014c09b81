"""Which rows share a forward pass: rows of about one length, so that few columns are padding.

A pass over some rows computes as many columns as the longest prompt and the longest response of
them take. Rows are sorted by length and cut into passes so that the columns computed, plus a fixed
price for each pass, are fewest. How rows are laid out changes memory and speed, and results by
rounding alone.

A model that reads packed rows (:mod:`tre_lightning.policy.packing`) computes no padding, and a
prompt once for all its rows in a pass: there, rows of one prompt share a pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from tre_lightning.batches import Rollout, TrainingBatch
from tre_lightning.common.distributed import world

# Tokens in whose time a pass more is worth it: its kernels are launched again, its products are
# smaller. At 0 most rows would have a pass of their own.
PASS_TOKENS = 96
_STRIPS = (1, 4, 16)

Array = NDArray[np.int64]
Rows = TypeVar("Rows", bound=Rollout)


@dataclass(frozen=True)
class PassLimit:
    """The most that one forward pass takes; None = no limit. One row always fits.

    Args:
        tokens: rows x columns, prompts, responses and padding; of packed rows, the tokens alone.
        rows: responses.
    """

    tokens: int | None = None
    rows: int | None = None


def plan(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    limit: PassLimit,
    ranks: int = 1,
) -> list[list[list[int]]]:
    """Row numbers of each pass of each rank, ``[ranks][passes]`` lists.

    The ranks have equally many passes, of about equally many tokens each; where there are too few
    rows, some passes have none. The same lengths give the same plan everywhere.

    Args:
        prompt_lengths: tokens of the prompt of each of B rows.
        response_lengths: tokens of each row's response.
        limit: of a pass.
        ranks: among which the rows are shared.

    Example:
        >>> plan([4, 4, 4, 4], [900, 10, 900, 12], PassLimit(tokens=2000))
        [[[0, 2], [3, 1]]]
    """
    prompts, responses = (
        np.array(prompt_lengths, dtype=np.int64),
        np.array(response_lengths, dtype=np.int64),
    )
    cuts = [_cut(prompts, responses, o, limit, ranks) for o in _orders(prompts, responses)]
    parts = min(cuts, key=lambda cut: cut[0])[1]
    passes: list[list[list[int]]] = [[] for _ in range(ranks)]
    for number, rows in enumerate(parts):
        for rank in range(ranks):
            # By turns, as the first one gets the longest row of all.
            turn = rank if number % 2 == 0 else ranks - 1 - rank
            passes[rank].append(rows[turn::ranks].tolist())
    return passes


def _orders(prompts: Array, responses: Array) -> Iterator[Array]:
    """Orders in which rows of about one length stand side by side, ``[B]`` row numbers each.

    By the response alone; and, where prompts differ, in strips of prompts of about one length that
    are run through to and fro.
    """
    for count in _STRIPS if len(set(prompts)) > 1 else (1,):
        strips = np.array_split(np.argsort(-prompts, kind="stable"), count)
        sorted_strips = [
            strip[np.lexsort((-prompts[strip], -responses[strip]))] for strip in strips
        ]
        yield np.concatenate([strip[:: (-1) ** i] for i, strip in enumerate(sorted_strips)])


def _cut(
    prompts: Array, responses: Array, order: Array, limit: PassLimit, ranks: int
) -> tuple[float, list[Array]]:
    """The cheapest passes over rows in this order: their price in tokens, and the rows of each.

    Each is of all ranks together. Dynamic programming from the last row on.
    """
    prompts, responses, count = prompts[order], responses[order], len(order)
    rows = (np.arange(count) + ranks) // ranks  # of the fullest rank, by those of all ranks
    price = np.zeros(count + 1)  # of the passes over the rows from this one on
    ends = np.zeros(count, dtype=int)  # of the pass that begins with this row
    for first in range(count - 1, -1, -1):
        most = count if limit.rows is None else limit.rows * ranks
        if limit.tokens is not None:
            most = min(most, max(1, limit.tokens // (prompts[first] + responses[first])) * ranks)
        part = slice(first, first + most)
        widths = np.maximum.accumulate(prompts[part]) + np.maximum.accumulate(responses[part])
        tokens = rows[: len(widths)] * widths
        if limit.tokens is not None:
            fitting = int(np.searchsorted(tokens, limit.tokens, side="right"))
            tokens = tokens[: max(fitting, ranks)]
        totals = tokens + price[first + 1 : first + 1 + len(tokens)]
        best = len(totals) - 1 - int(totals[::-1].argmin())  # of equal ones the last
        price[first], ends[first] = totals[best] + PASS_TOKENS, first + 1 + best
    parts, first = [], 0
    while first < count:
        parts.append(order[first : ends[first]])
        first = ends[first]
    return float(price[0]), parts


def packed_plan(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    prompts: Sequence[int],
    limit: PassLimit,
    ranks: int = 1,
) -> list[list[list[int]]]:
    """The same as :func:`plan` for packed rows: those of one prompt share a pass where they fit.

    Args:
        prompt_lengths: tokens of the prompt of each of B rows.
        response_lengths: tokens of each row's response.
        prompts: number of each row's prompt, equal where prompts are.
        limit: of a pass.
        ranks: among which the rows are shared.

    Example:
        >>> packed_plan([9, 9, 9, 9], [1, 2, 3, 4], [0, 1, 0, 1], PassLimit(tokens=20))
        [[[0, 2], [1, 3]]]
    """

    def fits(rows: Sequence[int]) -> bool:
        once = {prompts[row]: prompt_lengths[row] for row in rows}
        tokens = sum(once.values()) + sum(response_lengths[row] for row in rows)
        return (limit.tokens is None or tokens <= limit.tokens) and (
            limit.rows is None or len(rows) <= limit.rows
        )

    order = sorted(range(len(prompts)), key=lambda row: prompts[row])
    passes = []
    for part in _shares(order, prompt_lengths, response_lengths, prompts, ranks):
        filled: list[list[int]] = []
        for _, rows in groupby(part, key=lambda row: prompts[row]):
            group = list(rows)
            whole = fits(group)
            for start, row in enumerate(group):
                more = group if whole and start == 0 else [row]
                if not filled or not fits([*filled[-1], *more]):
                    filled.append([])
                filled[-1].append(row)
        passes.append(filled)
    count = max(map(len, passes))
    return [[*filled, *[[] for _ in range(count - len(filled))]] for filled in passes]


def _shares(
    order: Sequence[int],
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[int],
    prompts: Sequence[int],
    ranks: int,
) -> list[Sequence[int]]:
    """Rows, those of one prompt side by side, in consecutive parts of about equal tokens.

    A cut among rows of one prompt has that computed twice, which counts against it.
    """
    again = np.array(
        [
            prompt_lengths[row] * (prompts[row] == prompts[before])
            for before, row in pairwise(order)
        ],
        dtype=np.int64,
    )
    tokens = np.array([prompt_lengths[row] + response_lengths[row] for row in order])
    tokens[1:] -= again
    until, price, cuts = np.append(0, tokens.cumsum()), np.pad(again, 1), [0]
    for rank in range(1, ranks):
        off = np.abs(until - until[-1] * rank / ranks) + price[: len(until)]
        cuts.append(max(cuts[-1], int(off.argmin())))
    return [order[start:end] for start, end in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def passes_of(
    rollout: Rollout, limit: PassLimit, *, packed: bool, ranks: int = 1
) -> list[list[list[int]]]:
    """Row numbers of each pass of each rank, for a model that reads ``packed`` rows or not."""
    if packed:
        return packed_plan(*rollout.lengths(), rollout.prompts(), limit, ranks)
    return plan(*rollout.lengths(), limit, ranks)


def passes_over(
    batch: Rows, passes: Sequence[Sequence[int]], some: Tensor
) -> Iterator[tuple[Tensor, Rows]]:
    """The rows of each pass: their numbers, and the batch of them without needless columns.

    Of a pass without rows: no numbers, and a row of which no token counts.

    Args:
        batch: B rows, at least one.
        passes: as :func:`plan` has them.
        some: the rows that were planned, numbers in the batch.
    """
    for planned in passes:
        rows = some[planned]
        part = batch[rows] if planned else batch[:1].uncounted()
        yield rows, part.trimmed()


def local_micro_batches(
    minibatch: TrainingBatch, wanted: Tensor, limit: PassLimit, *, packed: bool = False
) -> list[TrainingBatch]:
    """This rank's part of a global minibatch, in micro-batches; equally many on all ranks.

    At least one, as all ranks take part in every optimiser step.

    Args:
        minibatch: B responses.
        wanted: those that are computed, ``[B]`` bool.
        limit: of a pass.
        packed: as in :func:`passes_of`.
    """
    (rank, ranks), some = world(), wanted.nonzero().squeeze(1)
    passes = passes_of(minibatch[some], limit, packed=packed, ranks=ranks)[rank]
    return [micro for _, micro in passes_over(minibatch, passes or [[]], some)]
