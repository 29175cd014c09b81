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

from tre_lightning.ops.region import (
    BLOCK,
    STEP,
    Region,
    RegionRows,
    Summary,
    as_computed,
    batches,
    compute_dtype,
)

_BINS, _BINS_A_NAT = 4096, 64  # the last bin takes all that lies lower
_FLOOR = -1e30  # stands for a logit of -inf where it meets a factor of 0


def summarise(logits: Tensor, temperature: float) -> Summary:
    """Norm, entropy and blocks of ``softmax(logits / temperature)``, ``[N, V]``."""
    count, vocabulary = logits.shape
    blocks = -(-vocabulary // BLOCK)
    empty = partial(logits.new_empty, dtype=compute_dtype(logits))
    out = Summary(empty(count), empty(count), empty(count, blocks), empty(count, blocks))
    for rows, x, buffer in _steps(logits, temperature):
        for whole, part in zip(out, _summarise(x, buffer), strict=True):
            whole[rows] = part
    return out


def read(
    logits: Tensor,
    temperature: float,
    summary: Summary,
    region: Region,
    rows: Tensor,
    out: RegionRows,
) -> None:
    """Fill in the regions of some rows from all their logits.

    The logits fall into bins by their distance from the largest; the bin in which the region ends
    is sorted.
    """
    for part in batches(rows, 3 * logits.shape[1]):  # several buffers, of float64 and int64 too
        _read_batch(logits, temperature, summary, region, part, out)


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
    """Write p_j * f_j + what is added at some tokens, to ``out``, which may be ``logits``.

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
        full = factor[rows, None]
        for region, slope, level in wide:
            part = region.rows(rows)
            which = part.wide.nonzero().squeeze(1)
            if not len(which):
                continue
            every = len(which) == len(x)
            z = x if every else x[which]
            piece = z.clamp(min=_FLOOR).add_(level[rows][which, None])
            piece.mul_(slope[rows][which, None])
            if (part.threshold[which] > -math.inf).any():
                piece.mul_(_mask(z, part.rows(which)))
            if every:
                full = piece.add_(full)
            else:
                full = full.repeat(1, x.shape[1] // full.shape[1])
                full[which] += piece
        torch.softmax(x, 1, out=p).mul_(full).scatter_add_(1, ids[rows], at_ids[rows])
        if p is buffer:
            out[rows] = p


def _steps(logits: Tensor, temperature: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their logits in the compute dtype, temperature applied, and a buffer of their shape."""
    count, vocabulary = logits.shape
    dtype = compute_dtype(logits)
    step = max(2, STEP // vocabulary)  # torch's softmax gives each thread whole rows
    buffers = logits.new_empty((2, min(step, count), vocabulary), dtype=dtype)
    for start in range(0, count, step):
        x = logits[start : start + step]
        if dtype != logits.dtype:
            x = buffers[0, : len(x)].copy_(x)
        if temperature != 1.0:
            x = torch.div(x, temperature, out=buffers[0, : len(x)])
        yield slice(start, start + len(x)), x, buffers[1, : len(x)]


def _summarise(x: Tensor, p: Tensor) -> Summary:
    block_max = _over_blocks(x, torch.amax)
    peak, block = block_max.max(1)
    torch.softmax(x, 1, out=p)
    # torch adds a row up token by token, in float32 to some 1e-5; these sums tell what it missed.
    block_mass = _over_blocks(p, torch.sum)
    total = block_mass.sum(1)
    # The largest probability is 1 / sum(exp(x - peak)); it stands in the block of the peak.
    near = block.unsqueeze(1) * BLOCK + torch.arange(BLOCK, device=x.device)
    largest = p.gather(1, near.clamp_(max=x.shape[1] - 1)).amax(1)
    log_norm = peak + (total / largest).log()
    entropy = (log_norm - _dot(p, x) / total).clamp(min=0.0)
    return Summary(log_norm, entropy, block_max, block_mass / total.unsqueeze(1))


def _over_blocks(x: Tensor, reduce: Any) -> Tensor:
    """Reduce every BLOCK neighbours, ``[N, V] -> [N, ceil(V / BLOCK)]``."""
    whole = x.shape[1] - x.shape[1] % BLOCK
    parts = [reduce(x[:, :whole].unflatten(1, (-1, BLOCK)), 2)] if whole else []
    if whole < x.shape[1]:
        parts.append(reduce(x[:, whole:], 1, keepdim=True))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def _read_batch(
    logits: Tensor,
    temperature: float,
    summary: Summary,
    region: Region,
    rows: Tensor,
    out: RegionRows,
) -> None:
    x = as_computed(logits[rows], temperature)
    p = torch.softmax(x, 1)
    weight = p.double() if region.top_p else (x > -math.inf).double()
    peak = summary.block_max[rows].amax(1, keepdim=True)
    bins = (peak - x).mul_(_BINS_A_NAT).clamp_(max=_BINS - 1).long()
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
    out.threshold[rows] = threshold
    out.last[rows] = torch.where(more_tie, ids[end], x.shape[1] - 1)
    inside = _mask(x, out.rows(rows))
    out.size[rows] = inside.sum(1).long()
    inside.mul_(p)
    held_inside, held_outside = inside.sum(1), p.sub_(inside).sum(1)
    total = held_inside + held_outside  # 1 but for rounding
    out.mass[rows] = held_inside / total
    out.tail_mass[rows] = held_outside / total
    log_mass = summary.log_norm[rows] + (held_inside / total).log()
    out.entropy[rows] = (log_mass - _dot(inside, x) / held_inside).clamp_(min=0.0)


def _mask(x: Tensor, region: RegionRows) -> Tensor:
    """1 inside the region and 0 outside, ``[N, V]`` in the dtype of x."""
    # Comparing in place keeps the dtype: torch's masks and selections by bool are far slower.
    mask = x.clone().ge_(region.threshold.unsqueeze(1))
    last = region.last.tolist()
    for row in (region.last < x.shape[1] - 1).nonzero().squeeze(1).tolist():
        late = slice(last[row] + 1, None)  # here, tokens at the threshold are outside
        mask[row, late].copy_(x[row, late]).gt_(region.threshold[row])
    return mask


def _dot(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p * x over each row; a token of probability 0 adds nothing, whatever its logit."""
    dots = torch.mul(p, x).sum(1)
    odd = dots.isnan()
    if odd.any():
        odd &= ~p[:, 0].isnan()  # a row with NaN stays NaN
        dots[odd] = torch.mul(p[odd], x[odd].clamp(min=_FLOOR)).sum(1)
    return dots
