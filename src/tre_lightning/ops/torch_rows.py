"""The passes over the logits, in plain torch: summary, wide regions, gradient.

A step takes as many rows as stay in the processor's cache, so that each pass reads the logits from
memory once, whatever is computed from them.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tre_lightning.entropy import Region, min_p_threshold
from tre_lightning.ops.region import BLOCK, STEP, RegionRows, Summary, batches, compute_dtype

_BINS, _BINS_A_NAT = 1024, 48  # the last bin takes all that lies lower
_FLOOR = -1e30  # stands for a logit of -inf where it meets a factor of 0


def summarise(logits: Tensor, temperature: float) -> Summary:
    """Norm, entropy and blocks of ``softmax(logits / temperature)``, ``[N, V]``."""
    count, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    empty = partial(logits.new_empty, dtype=compute_dtype(logits))
    block_max, block_mass = empty(count, blocks), empty(count, blocks)
    largest, dot = empty(count), empty(count)
    # Few rows fit the cache, so all that can wait until every row is read does.
    for rows, x, p in _steps(logits, temperature):
        _over_blocks(x, torch.amax, block_max[rows])
        torch.softmax(x, 1, out=p)
        _over_blocks(p, torch.sum, block_mass[rows])
        torch.amax(p, 1, out=largest[rows])
        dot[rows] = _dot(p, x)
    # torch adds a row up token by token, in float32 to some 1e-5; these sums tell what it missed.
    total = block_mass.sum(1)
    # The largest probability is 1 / sum(exp(x - peak)).
    log_norm = block_max.amax(1) + (total / largest).log()
    entropy = (log_norm - dot / total).clamp_(min=0.0)
    return Summary(log_norm, entropy, block_max, block_mass.div_(total.unsqueeze(1)))


def read(
    logits: Tensor,
    temperature: float,
    summary: Summary,
    region: Region,
    rows: Tensor,
    out: RegionRows,
) -> None:
    """Fill in the regions of some rows from all their logits.

    To find the edge of ``top_k`` and ``top_p``, the logits fall into bins by their distance from
    the largest; the bin in which the region ends is sorted.
    """
    parts = batches(rows, 3 * logits.shape[1] // 2)  # several buffers, of float64 and int64 too
    size = len(parts[0]), logits.shape[1]
    # Reused: memory that is new to the process costs more than the arithmetic.
    x, p, spare = logits.new_empty((3, *size), dtype=compute_dtype(logits))
    weight, bins = x.new_empty(size, dtype=torch.float64), x.new_empty(size, dtype=torch.int64)
    found = []
    for part in parts:
        buffers = [buffer[: len(part)] for buffer in (x, p, spare, weight, bins)]
        found.append(_read_batch(logits, temperature, summary, region, part, *buffers))
    threshold, last, count, inside, outside, dot = map(torch.cat, zip(*found, strict=True))
    total = inside + outside  # 1 but for rounding
    log_mass = summary.log_norm[rows] + (inside / total).log()
    out.threshold[rows] = threshold
    out.last[rows] = last
    out.size[rows] = count.long()
    out.mass[rows] = inside / total
    out.tail_mass[rows] = outside / total
    out.entropy[rows] = (log_mass - dot / inside).clamp_(min=0.0)


def gradient(
    logits: Tensor,
    temperature: float,
    log_norm: Tensor,
    ids: Tensor,
    at_ids: Tensor,
    factor: Tensor,
    wide: Sequence[tuple[RegionRows, Tensor, Tensor]],
    out: Tensor,
) -> None:
    """Write p_j * f_j, plus additions at some tokens, to ``out``, which may be ``logits``.

    Args:
        logits: ``[N, V]``.
        temperature: p is the softmax of logits / temperature, x.
        log_norm: logsumexp of x, ``[N]``.
        ids: tokens ``[N, K]`` at which something is added.
        at_ids: what is added there, ``[N, K]``.
        factor: f_j before the wide regions, ``[N]``.
        wide: regions with slope and level ``[N]`` each: slope * (x_j + level) is added to f_j at
            the tokens of the region, in the rows where it is wide.
        out: ``[N, V]``, of the dtype of the logits.
    """
    for rows, x, buffer in _steps(logits, temperature):
        p = out[rows] if out.dtype == x.dtype else buffer
        pieces: list[tuple[slice | Tensor, Tensor]] = []
        for region, slope, level in wide:
            part = region.rows(rows)
            found = part.wide.nonzero().squeeze(1)
            if not len(found):
                continue
            which = slice(None) if len(found) == len(x) else found  # a slice copies nothing
            z, threshold = x[which], part.threshold[which]
            piece = z.clamp(min=_FLOOR).add_(level[rows][which, None])
            piece.mul_(slope[rows][which, None])
            if (threshold > -math.inf).any():
                piece.mul_(_mask(z, threshold, part.last[which], torch.empty_like(z)))
            pieces.append((which, piece))
        torch.softmax(x, 1, out=p)
        for which, piece in pieces:
            piece.mul_(p[which])
        p.mul_(factor[rows, None])
        for which, piece in pieces:
            p[which] += piece
        p.scatter_add_(1, ids[rows], at_ids[rows])
        if p is buffer:
            out[rows] = p


def _steps(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their logits in the compute dtype, temperature applied, and a buffer of their shape."""
    count, vocabulary = logits.shape
    dtype = compute_dtype(logits)
    threads = torch.get_num_threads()  # torch's softmax gives each of them whole rows
    step = max(1, STEP // (vocabulary * threads)) * threads
    buffers = logits.new_empty((2, min(step, count), vocabulary), dtype=dtype)
    for start in range(0, count, step):
        x = logits[start : start + step]
        if dtype != logits.dtype:
            x = buffers[0, : len(x)].copy_(x)
        if temperature != 1.0:
            x = torch.div(x, temperature, out=buffers[0, : len(x)])
        yield slice(start, start + len(x)), x, buffers[1, : len(x)]


def _over_blocks(x: Tensor, reduce: Any, out: Tensor) -> None:
    """Reduce every BLOCK neighbours, ``[N, V] -> [N, ceil(V / BLOCK)]``."""
    whole = x.shape[1] - x.shape[1] % BLOCK
    if whole:
        reduce(x[:, :whole].unflatten(1, (-1, BLOCK)), 2, out=out[:, : whole // BLOCK])
    if whole < x.shape[1]:
        reduce(x[:, whole:], 1, out=out[:, -1])


def _read_batch(
    logits: Tensor,
    temperature: float,
    summary: Summary,
    region: Region,
    rows: Tensor,
    x: Tensor,
    p: Tensor,
    spare: Tensor,
    weight: Tensor,
    bins: Tensor,
) -> tuple[Tensor, ...]:
    """Regions of n rows; the last five arguments are overwritten, ``[n, V]``.

    Returns:
        threshold, last, size, mass inside, mass outside and the sum of p * x inside, ``[n]``.
    """
    if x.dtype == logits.dtype:
        torch.index_select(logits, 0, rows, out=x)
    else:
        x.copy_(logits.index_select(0, rows))
    if temperature != 1.0:
        x.div_(temperature)
    torch.softmax(x, 1, out=p)
    peak = summary.block_max.index_select(0, rows).amax(1, keepdim=True)
    if region.min_p is not None:
        threshold = min_p_threshold(peak, region.min_p).squeeze(1)
        last = torch.full_like(rows, x.shape[1] - 1)
    else:
        threshold, last = _edge(region, peak, x, p, spare, weight, bins)
    inside = _mask(x, threshold, last, spare)
    size = inside.sum(1)
    held_inside = inside.mul_(p).sum(1)
    held_outside = p.sub_(inside).sum(1)
    return threshold, last, size, held_inside, held_outside, _dot(inside, x)


def _edge(
    region: Region,
    peak: Tensor,
    x: Tensor,
    p: Tensor,
    spare: Tensor,
    weight: Tensor,
    bins: Tensor,
) -> tuple[Tensor, Tensor]:
    """Threshold and last ``[n]`` of a top k or nucleus; the last three arguments are overwritten.

    ``peak`` ``[n, 1]`` is the largest of each row of ``x``, and p its softmax, ``[n, V]``.
    """
    weight.copy_(p if region.top_p else x > -math.inf)
    torch.sub(peak, x, out=spare)
    bins.copy_(spare.mul_(_BINS_A_NAT).clamp_(max=_BINS - 1))
    held = weight.new_zeros(len(x), _BINS).scatter_add_(1, bins, weight)
    reached = held.cumsum(1)
    # The region ends with the last token at the latest, also where rounding makes top_p 1.
    every = reached[:, -1:]
    target = every * region.top_p if region.top_p else every.clamp(max=float(region.top_k or 0))
    crossing = (reached < target).sum(1, keepdim=True)
    above = (reached - held).gather(1, crossing)
    # The tokens of those bins, row by row, in the order of their logits, ties by id.
    row, ids = (bins == crossing).nonzero(as_tuple=True)
    order = x[row, ids].sort(stable=True, descending=True).indices
    order = order[row[order].sort(stable=True).indices]
    row, ids = row[order], ids[order]
    values, mass = x[row, ids], weight[row, ids]
    count = row.bincount(minlength=len(x))
    first = count.cumsum(0) - count
    running = mass.cumsum(0)
    before = (running - mass)[first]
    short = running - before[row] + above.squeeze(1)[row] < target.squeeze(1)[row]
    place = torch.zeros_like(count).index_add_(0, row, short.long()).minimum(count - 1)
    end = first + place
    threshold = values[end]
    more_tie = (place + 1 < count) & (values[(end + 1).clamp(max=len(values) - 1)] == threshold)
    return threshold, torch.where(more_tie, ids[end], x.shape[1] - 1)


def _mask(x: Tensor, threshold: Tensor, last: Tensor, mask: Tensor) -> Tensor:
    """1 inside the region and 0 outside, ``[N, V]`` in the dtype of x, written to ``mask``."""
    # torch's masks and selections by bool are far slower.
    torch.ge(x, threshold.unsqueeze(1), out=mask)
    end = x.shape[1] - 1
    for row, place in enumerate(last.tolist()):
        if place < end:
            late = slice(place + 1, None)  # here, tokens at the threshold are outside
            torch.gt(x[row, late], threshold[row], out=mask[row, late])
    return mask


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p * x over each row, ``[N]``; overwrites p.

    A token of probability 0 adds nothing, whatever its logit. A row of NaN may give 0.
    """
    dots = p.mul_(x).sum(1)
    if dots.isnan().any():  # 0 * -inf
        dots = p.nan_to_num_(nan=0.0).sum(1)
    return dots
