"""Search for the trust region of every row, without sorting the vocabulary.

The largest logits of a row lie in the blocks with the largest maxima, so one pass over the logits
that takes block maxima leaves a few hundred candidates to sort. Where a nucleus is wider, the
backend reads the row again (:func:`tre_lightning.ops.torch_rows.read`). Both ways are exact: ties
at the edge go to the lower token id, as in :mod:`tre_lightning.entropy`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from tre_lightning.entropy import Region, min_p_threshold

BLOCK = 64  # tokens of one maximum
_SPARE = 8  # blocks looked at beyond the tokens wanted: where more tie, the whole row is read
_LOOKS = (16, 128)  # tokens of a nucleus looked for among candidates, before its row is read
_ROUNDING = 1e-3
_MOST = 256  # a larger top_k reads the row at once
STEP = 2**19  # logits worked on at once: buffers of 2 MB, that stay in the processor's cache


class Summary(NamedTuple):
    """What one pass over the logits keeps of each row; p is its softmax."""

    log_norm: Tensor  # [N], logsumexp
    entropy: Tensor  # [N], of p, nats
    block_max: Tensor  # [N, ceil(V / BLOCK)], largest logit of BLOCK neighbours
    block_mass: Tensor  # [N, ceil(V / BLOCK)], sum of p over them


class RegionRows(NamedTuple):
    """The region A of every row: the tokens above ``threshold``, and those at it up to ``last``."""

    entropy: Tensor  # [N], of q, the softmax over A alone, nats
    size: Tensor  # [N] int64, |A|; 0 where the row has NaN or nothing but -inf
    mass: Tensor  # [N], probability of A
    tail_mass: Tensor  # [N], probability outside A
    threshold: Tensor  # [N], the smallest logit in A, or a number between it and those outside
    last: Tensor  # [N] int64, the last token id at the threshold that is in A; V - 1 = all of them
    ids: Tensor  # [N, K] int64, the tokens of A padded with its first, unless ``wide``
    wide: Tensor  # [N] bool, whether only threshold and last tell which tokens are in A

    def listed(self) -> Tensor:
        """Which of ``ids`` are tokens of A, each once, ``[N, K]`` bool."""
        place = torch.arange(self.ids.shape[1], device=self.ids.device)
        return (place < self.size.unsqueeze(1)) & ~self.wide.unsqueeze(1)

    def rows(self, which: slice | Tensor) -> "RegionRows":
        """The regions of some of the rows."""
        return RegionRows(*(part[which] for part in self))


def compute_dtype(logits: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def as_computed(logits: Tensor, temperature: float) -> Tensor:
    """The logits in the compute dtype, divided by the temperature."""
    x = logits.to(compute_dtype(logits))
    return x if temperature == 1.0 else x / temperature


Reader = Callable[[Tensor, float, Summary, Region, Tensor, "RegionRows"], None]


def find(
    logits: Tensor, temperature: float, summary: Summary, region: Region, read: Reader
) -> RegionRows:
    """The region of every row.

    Args:
        logits: ``[N, V]``, contiguous.
        temperature: what they are divided by.
        summary: of the logits, temperature applied.
        region: which region.
        read: fills in the rows of the output whose regions are too wide for candidates; it takes
            the first four arguments, the rows and the output.
    """
    count, vocabulary = logits.shape
    top_k = None if region.top_k is None else min(region.top_k, vocabulary)
    if region.whole:
        looks = []
    elif top_k is not None:
        looks = [top_k] if top_k <= _MOST else []
    elif vocabulary <= 8 * BLOCK:
        looks = [vocabulary]
    else:
        looks = [look for look in _LOOKS if look < vocabulary]
    values = summary.log_norm
    out = RegionRows(
        entropy=torch.full_like(values, math.nan),
        size=values.new_zeros(count, dtype=torch.int64),
        mass=torch.full_like(values, math.nan),
        tail_mass=torch.full_like(values, math.nan),
        threshold=torch.full_like(values, math.nan),
        last=values.new_full((count,), vocabulary - 1, dtype=torch.int64),
        ids=values.new_zeros((count, max(looks, default=1)), dtype=torch.int64),
        wide=values.new_ones(count, dtype=torch.bool),
    )
    if region.whole:
        defined = values.abs() < math.inf
        out.entropy.copy_(summary.entropy)
        out.size[defined] = vocabulary
        out.mass.fill_(1.0)
        out.tail_mass[defined] = 0.0
        out.threshold.fill_(-math.inf)
        return out
    least_size = _least_size(summary, region)
    left = (values.abs() < math.inf).nonzero().squeeze(1)
    for look in looks:
        may = look >= least_size[left]
        pieces = batches(left[may], min(vocabulary, (look + _SPARE) * BLOCK))
        rest = [_look(logits, temperature, summary, region, look, rows, out) for rows in pieces]
        left = torch.cat([left[~may], *rest])
    if len(left):
        read(logits, temperature, summary, region, left, out)
    return out


def _least_size(summary: Summary, region: Region) -> Tensor:
    """A number of tokens that no region is smaller than, ``[N]``, without a look at the logits."""
    peak = summary.block_max.amax(1)
    if region.min_p is not None:
        inside = summary.block_max >= min_p_threshold(peak, region.min_p).unsqueeze(1)
        return inside.sum(1)
    # top_p takes fewest tokens where each is as probable as the first.
    return ((region.top_p or 0.0) - _ROUNDING) / (peak - summary.log_norm).exp()


def batches(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Row numbers in chunks of about ``STEP`` elements at ``width`` per row."""
    return rows.split(max(1, STEP // width)) if len(rows) else ()


def _look(
    logits: Tensor,
    temperature: float,
    summary: Summary,
    region: Region,
    look: int,
    rows: Tensor,
    out: RegionRows,
) -> Tensor:
    """Fill in the regions of at most ``look`` tokens of some rows; return the rows left over."""
    vocabulary, blocks = logits.shape[1], summary.block_max.shape[1]
    log_norm = summary.log_norm[rows, None]
    if 2 * (look + _SPARE) >= blocks:
        pool = as_computed(logits[rows], temperature)
        chosen = torch.arange(blocks, device=logits.device).expand(len(rows), -1)
        bound = torch.full_like(log_norm, -math.inf)
        rest = torch.zeros_like(log_norm)
    else:
        # index_select is faster than brackets.
        best = summary.block_max.index_select(0, rows).topk(look + _SPARE)
        chosen = best.indices.sort(1).values
        pool = as_computed(_blocks_of(logits, rows, chosen), temperature)
        bound = best.values[:, -1:]  # at or under it, a logit may have a tie elsewhere
        block_mass = summary.block_mass.index_select(0, rows)
        rest = block_mass.scatter_(1, chosen, 0.0).sum(1, keepdim=True)
    values, order = pool.topk(min(look + 1, pool.shape[1]))
    size = (values > -math.inf).sum(1, keepdim=True).clamp(max=look)
    if region.top_p is not None:
        reached = (values - log_norm).exp().cumsum(1, dtype=torch.float64)
        crossing = (reached < region.top_p).sum(1, keepdim=True) + 1
        # With every token at hand, rounding alone can leave top_p out of reach.
        size = crossing.minimum(size) if look == vocabulary else crossing
    elif region.min_p is not None:
        peak = summary.block_max.index_select(0, rows).amax(1, keepdim=True)
        size = (values >= min_p_threshold(peak, region.min_p)).sum(1, keepdim=True)
    done = size <= look
    edge = values.gather(1, (size - 1).clamp(max=look - 1))
    beyond = values.gather(1, size.clamp(max=values.shape[1] - 1))
    cut = done & (edge == beyond) & (size < values.shape[1])  # tokens that tie are outside
    order = order[:, :look]
    if cut.any():
        # The candidates stand in the order of their ids; a stable sort keeps it among ties.
        tied = cut.squeeze(1)
        order[tied] = pool[tied].sort(dim=1, descending=True, stable=True).indices[:, :look]
        done &= ~(cut & (edge <= bound))  # tokens that tie may not be among the candidates
    outside = torch.arange(look, device=logits.device) >= size
    log_q = values[:, :look].masked_fill(outside, -math.inf).log_softmax(1)
    p = (pool - log_norm).exp_()
    inside = p.gather(1, order).masked_fill_(outside, 0.0)
    order = torch.where(outside, order[:, :1], order)
    mass = inside.sum(1, keepdim=True)
    # Subtracting the mass from 1 would lose a thin tail.
    tail_mass = p.scatter_(1, order, 0.0).sum(1, keepdim=True) + rest
    ids = chosen.gather(1, order // BLOCK) * BLOCK + order % BLOCK
    last = torch.where(cut, ids.gather(1, (size - 1).clamp(max=look - 1)), vocabulary - 1)
    found = done.squeeze(1)
    filled = rows[found]
    columns = {
        "entropy": -(log_q.exp() * log_q.masked_fill(outside, 0.0)).sum(1, keepdim=True),
        "size": size,
        "mass": mass,
        "tail_mass": tail_mass,
        "threshold": edge,
        "last": last,
    }
    for name, column in columns.items():
        getattr(out, name)[filled] = column.squeeze(1)[found]
    out.ids[filled, :look] = ids[found]
    out.wide[filled] = False
    return rows[~found]


def _blocks_of(logits: Tensor, rows: Tensor, chosen: Tensor) -> Tensor:
    """The logits of some blocks of some rows, ``[n, c] -> [n, c * BLOCK]``; -inf beyond the end."""
    vocabulary = logits.shape[1]
    if vocabulary % BLOCK == 0:
        places = rows.unsqueeze(1) * (vocabulary // BLOCK) + chosen
        near = logits.view(-1, BLOCK).index_select(0, places.flatten())
        return near.view(len(rows), -1)
    inner = torch.arange(BLOCK, device=logits.device)
    ids = (chosen.unsqueeze(2) * BLOCK + inner).flatten(1)
    missing = ids >= vocabulary
    near = logits.view(-1)[rows.unsqueeze(1) * vocabulary + ids.clamp_(max=vocabulary - 1)]
    return near.masked_fill_(missing, -math.inf)
