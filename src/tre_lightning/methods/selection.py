"""Selection of the counted tokens that a method acts on."""

import math

import torch
from torch import Tensor


def check_fraction(name: str, fraction: float, hint: str) -> None:
    """Raise ValueError, ending with ``hint``, unless the fraction lies in (0, 1]."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"{name}={fraction} must be above 0 and at most 1; {hint}")


def fraction_of(count: int, fraction: float, *, up: bool = False) -> int:
    """``fraction`` of ``count`` tokens, rounded down or ``up``; at least 1, unless of none."""
    exact = round(fraction * count, 6)  # 0.07 * 100 comes out above 7
    return min(count, max(1, math.ceil(exact) if up else math.floor(exact)))


def above_quantile(values: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """The tokens above the 1 - ``fraction`` quantile of their own response, ``[B, T]`` bool.

    The quantile is interpolated, as numpy's; what equals it is not above: of a single token, or of
    equal ones, there is none. What stands outside the mask (NaN included) does not count.
    """
    ordered = values.double().masked_fill(~mask, math.inf).sort(-1).values
    last = (mask.sum(-1, keepdim=True) - 1).clamp(min=0)
    place = ((1.0 - fraction) * last.double()).mul(1e6).round().div(1e6)  # 0.8 * 5 may miss 4
    below = ordered.gather(-1, place.long())
    above = ordered.gather(-1, (place.long() + 1).minimum(last))
    quantile = below + (above - below) * (place - place.floor())
    return mask & (values > quantile)


def top(values: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ``count`` True entries of ``mask`` with the largest values, ``[B, T]`` bool.

    All of them where there are no more. Equal values: the earlier row first, then the earlier
    token. What stands outside the mask (NaN included) does not count.
    """
    order = values[mask].argsort(descending=True, stable=True)
    flags = torch.zeros_like(order, dtype=torch.bool)
    flags[order[:count]] = True
    chosen = torch.zeros_like(mask)
    chosen[mask] = flags
    return chosen
