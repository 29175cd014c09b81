r"""Trust Region Entropy, the paper in one file.

Source: "Encouraging Exploration in the Trust Region", arXiv 2602.03635. An entropy bonus over the
whole vocabulary pushes probability onto every token; over a response of T tokens the mass that
reaches the tail accumulates ("cumulative tail risk"). TRE raises entropy only inside a region
A of plausible tokens:

* region A: the ``top_k`` most probable tokens (TRE-K), or the smallest nucleus whose mass reaches
  ``top_p``, the token that crosses it included (TRE-P), or, ours beyond the paper, the tokens at
  least ``min_p`` times as probable as the most probable one (min-p, arXiv 2407.01082);
* q = softmax of the logits over A alone, H = -sum_A q log q;
* scaled by log|V| / log|A|, so that a uniform q scores log|V| whatever |A|; 0 where |A| = 1.

The region is a constant of the gradient: dH/dz_i = -q_i (log q_i + H) inside A, times the scale,
and 0 outside.

Deviations from the paper's code: the nucleus is exact (theirs stops at 256 tokens), and ties at its
edge go to the lower token id (at the edge of ``min_p`` all are in). With ``top_k: 1`` a region of
one token has entropy 0 and no gradient here; theirs gives -log max p. Tokens with a logit of -inf
do not exist: they are never in A. |V| is the size of the last axis, masked tokens included, so that
the scale does not vary by position. A row with NaN, or with nothing but -inf, gives NaN.

All functions take logits ``[..., V]`` in any float dtype, compute in float32 (float64 stays) and
return ``[...]`` in nats.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST_LOOK = 64  # sorted head of the vocabulary; only rows whose nucleus is wider are fully sorted


@dataclass(frozen=True)
class Region:
    """The tokens that an entropy is taken over: by ``top_k``, ``top_p`` or ``min_p``, else all.

    Raises:
        ValueError: if more than one is given, or one is out of range.

    Example:
        >>> Region(top_p=0.99), Region().whole
        (Region(top_k=None, top_p=0.99, min_p=None), True)
    """

    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not self.whole:
            check_region(self.top_k, self.top_p, self.min_p)

    @property
    def whole(self) -> bool:
        """Whether the region is the whole vocabulary."""
        return self.top_k is None and self.top_p is None and self.min_p is None


class EntropyStats(NamedTuple):
    """Entropies and region of every position, each ``[...]``."""

    full: Tensor  # entropy over the whole vocabulary, nats
    region: Tensor  # entropy of q, the softmax over the region alone, nats
    scaled: Tensor  # region entropy times the scale, nats
    scale: Tensor  # log|V| / log|A|, 0 where |A| = 1
    size: Tensor  # |A|, tokens (int64)
    tail_mass: Tensor  # probability outside the region


def trust_region_entropy(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    rescale: bool = True,
) -> Tensor:
    """Entropy inside the trust region, ``[..., V] -> [...]`` nats; ``rescale`` applies the scale.

    Raises:
        ValueError: unless exactly one of ``top_k`` (>= 1), ``top_p`` and ``min_p`` (in (0, 1)) is
            given.

    Example:
        >>> logits = torch.tensor([2.0, 2.0, 0.0, -1.0])
        >>> trust_region_entropy(logits, top_k=2)  # log 2, times log 4 / log 2
        tensor(1.3863)
    """
    size, mask = _region(logits, top_k, top_p, min_p)
    z = _upcast(logits)
    entropy = _entropy(z.masked_fill(~mask, -math.inf))
    return entropy * _scale(size, z) if rescale else entropy


def trust_region_mask(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Tensor:
    """The region A, ``[..., V] -> [..., V]`` bool. Same arguments and errors as the entropy.

    Example:
        >>> trust_region_mask(torch.tensor([2.0, 2.0, 0.0, -1.0]), top_p=0.95)
        tensor([ True,  True,  True, False])
    """
    return _region(logits, top_k, top_p, min_p)[1]


def full_entropy(logits: Tensor) -> Tensor:
    """Entropy over the whole vocabulary, ``[..., V] -> [...]`` nats."""
    return _entropy(_upcast(logits))


def entropy_of_tokens(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy inside regions given as token ids, and their scale, ``[...]`` each.

    Args:
        logits: ``[..., V]``.
        ids: the region, ``[..., C]`` int64; a negative id is no token. At least one token each.
    """
    z, inside = _upcast(logits), ids >= 0
    chosen = z.gather(-1, ids.clamp(min=0)).masked_fill(~inside, -math.inf)
    return _entropy(chosen), _scale((chosen > -math.inf).sum(-1), z)


@torch.no_grad()
def entropy_stats(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> EntropyStats:
    """All that the diagnostics show, from one search for the region; no gradient."""
    size, mask = _region(logits, top_k, top_p, min_p)
    z = _upcast(logits)
    log_p = z.log_softmax(-1).clamp_(min=torch.finfo(torch.float32).min)
    p = log_p.exp()
    p_log_p = log_p.mul_(p)
    full = -p_log_p.sum(-1)
    inside, tail_mass = (p * mask).sum(-1), (p * ~mask).sum(-1)
    region = inside.log() - (p_log_p * mask).sum(-1) / inside
    region = region.clamp(min=0.0) * (size > 1)
    scale = _scale(size, z)
    return EntropyStats(full, region, region * scale, scale, size, tail_mass)


def check_region(
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    *,
    owner: str = "",
) -> None:
    """Raise ValueError unless exactly one of the three is given, and lies in its range.

    ``top_k`` is at least 1, ``top_p`` and ``min_p`` lie in (0, 1). ``owner`` is where they are
    options, for the message.
    """
    if sum(value is not None for value in (top_k, top_p, min_p)) != 1:
        raise ValueError(
            f"{owner and owner + ': '}give exactly one of top_k, top_p and min_p and null for the "
            f"others, not top_k={top_k}, top_p={top_p}, min_p={min_p}"
        )
    dot = owner and owner + "."
    if top_k is not None and not top_k >= 1:
        raise ValueError(f"{dot}top_k={top_k} must be at least 1 token")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if value is not None and not 0.0 < value < 1.0:
            raise ValueError(f"{dot}{name}={value} must lie between 0 and 1, both excluded")


def min_p_threshold(peak: Tensor, min_p: float) -> Tensor:
    """The least logit of a token that is ``min_p`` times as probable as that at ``peak``."""
    return peak + math.log(min_p)


def _region(
    logits: Tensor, top_k: int | None, top_p: float | None, min_p: float | None
) -> tuple[Tensor, Tensor]:
    """Size ``[...]`` and mask ``[..., V]`` of the region: the ``size`` largest logits."""
    check_region(top_k, top_p, min_p)
    z = _upcast(logits.detach())
    if min_p is not None:
        mask = (z >= min_p_threshold(z.amax(-1, keepdim=True), min_p)) & (z > -math.inf)
        return mask.sum(-1), mask
    size, threshold = _top_k(z, top_k) if top_k is not None else _nucleus(z, top_p or 0.0)
    mask = z >= threshold
    crowded = mask.sum(-1) > size  # more tokens tie at the edge than have a place
    if crowded.any():
        z, threshold = z[crowded], threshold[crowded]
        above, tied = z > threshold, z == threshold
        places_left = size[crowded].unsqueeze(-1) - above.sum(-1, keepdim=True)
        mask[crowded] = above | (tied & (tied.cumsum(-1) <= places_left))
    return size, mask


def _top_k(z: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Size ``[...]`` of the top k and its smallest logit ``[..., 1]``."""
    head = z.topk(min(top_k, z.shape[-1])).values
    size = (head > -math.inf).sum(-1).clamp(min=1)
    threshold = head.gather(-1, (size - 1).unsqueeze(-1))
    return size, threshold.where(~head[..., :1].isnan(), math.nan)  # topk puts NaN first


def _nucleus(z: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Size ``[...]`` of the nucleus and its smallest logit ``[..., 1]``."""
    log_norm = z.logsumexp(-1, keepdim=True)
    size, threshold = _crossing(z.topk(min(_FIRST_LOOK, z.shape[-1])).values, log_norm, top_p)
    wide = size > _FIRST_LOOK
    if wide.any():
        ordered = z[wide].sort(-1, descending=True).values
        size[wide], threshold[wide] = _crossing(ordered, log_norm[wide], top_p)
    return size.clamp(max=z.shape[-1]), threshold  # rounding may leave top_p out of reach


def _crossing(head: Tensor, log_norm: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Size and smallest logit of the nucleus within sorted logits; size len + 1 if it is wider."""
    reached = (head - log_norm).exp().cumsum(-1, dtype=torch.float64)
    possible = (head > -math.inf).sum(-1)
    size = ((reached < top_p).sum(-1) + 1).clamp(min=1)
    exhausted = possible < head.shape[-1]  # the rest is -inf: rounding may leave top_p out of reach
    size = torch.where(exhausted, size.minimum(possible.clamp(min=1)), size)
    last = size.clamp(max=head.shape[-1]).unsqueeze(-1) - 1
    return size, head.gather(-1, last)


def _entropy(z: Tensor) -> Tensor:
    """Entropy ``[...]`` of softmax(z); tokens at -inf add nothing to value and gradient."""
    log_q = z.log_softmax(-1)
    return -(log_q.exp() * log_q.masked_fill(z == -math.inf, 0.0)).sum(-1)


def _scale(size: Tensor, z: Tensor) -> Tensor:
    """log|V| / log|A|, and 0 where |A| = 1."""
    log_size = size.clamp(min=2).to(z.dtype).log()
    return torch.where(size > 1, math.log(z.shape[-1]) / log_size, 0.0)


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
