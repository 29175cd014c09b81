"""The clipped losses of PPO, per token; the caller reduces them.

Every mean is a sum over counted tokens divided by the *global* number of counted tokens of the
minibatch, so that accumulating micro-batches, on any number of devices, gives the gradient of one
big batch.
"""

import math

import torch
from torch import Tensor

from tre_lightning.common.metrics import check_shape, like


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the True entries; other entries (NaN included) do not count."""
    return torch.where(mask, values, 0.0).sum()


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values ``[n, ...]`` of the True entries at their places, ``[B, T, ...]``; 0 elsewhere."""
    filled = values.new_zeros(mask.shape + values.shape[1:])
    filled[mask] = values
    return filled


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """New over old probability of each token, ``[B, T]``.

    Bounded at e^80: an infinity at a token that does not count would still make the gradient NaN.
    """
    return (logprobs - old_logprobs).clamp(max=80.0).exp()


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_eps_low: float | None,
    clip_eps_high: float | None,
    dual_clip: float | None = None,
) -> Tensor:
    """Clipped surrogate loss of each token, ``[B, T]`` (Schulman et al. 2017, arXiv 1707.06347).

    Args:
        logprobs: of the policy being trained, ``[B, T]``.
        old_logprobs: of the policy that sampled, ``[B, T]``.
        advantages: ``[B, T]``.
        clip_eps_low: the ratio is clipped at 1 - clip_eps_low; None = not from below.
        clip_eps_high: the ratio is clipped at 1 + clip_eps_high; None = not from above.
        dual_clip: c > 1 bounds the loss at -c * advantage where the advantage is negative
            (Ye et al. 2020, arXiv 1912.09729); None = unbounded.
    """
    ratio = policy_ratio(logprobs, old_logprobs)
    loss = -advantages * ratio
    if clip_eps_low is not None or clip_eps_high is not None:
        low = None if clip_eps_low is None else 1.0 - clip_eps_low
        high = None if clip_eps_high is None else 1.0 + clip_eps_high
        loss = torch.maximum(loss, -advantages * ratio.clamp(low, high))
    if dual_clip is not None:
        bounded = torch.minimum(loss, -advantages * dual_clip)
        loss = torch.where(advantages < 0, bounded, loss)
    return loss


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, value_clip_eps: float | None
) -> Tensor:
    """Half the squared error of each value, clipped around the old value, ``[B, T]``."""
    loss = (values - returns).square()
    if value_clip_eps is not None:
        near = old_values + (values - old_values).clamp(-value_clip_eps, value_clip_eps)
        loss = torch.maximum(loss, (near - returns).square())
    return 0.5 * loss


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """Per-token k3 estimate of KL(old || new): r - 1 - log r, log r = logprobs - old_logprobs.

    Unbiased for tokens sampled from the old policy, and never negative. Infinite where r overflows
    the result's dtype; NaN where both logprobs are -inf (padding: mask it out).

    Source: Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    Args:
        logprobs: log-probability of each token under the new policy, nats, ``[B, T]``.
        old_logprobs: the same tokens under the policy that sampled them, nats, ``[B, T]``.

    Returns:
        The estimate, nats, ``[B, T]``; float32, or float64 if either input is.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shape("old_logprobs", old_logprobs, "logprobs", logprobs)
    log_ratio = logprobs.double() - old_logprobs.double()
    # clamp: near 0 an expm1 that is off by one rounding may fall below its argument
    return like(torch.expm1(log_ratio) - log_ratio, logprobs, old_logprobs).clamp(min=0)


def clipped(
    ratio: Tensor, advantages: Tensor, clip_eps_low: float | None, clip_eps_high: float | None
) -> Tensor:
    """Tokens whose clipped surrogate is the active one, so that they give no policy gradient.

    True where (A > 0 and r > 1 + high) or (A < 0 and r < 1 - low); their mean is the clip
    fraction: ``MaskedMean().update(clipped(...), response_mask)``.

    Source: the minimum in PPO's objective, Schulman et al. 2017, eq. 7.

    Args:
        ratio: new over old probability of each token, ``[B, T]``.
        advantages: advantage of each token, ``[B, T]``.
        clip_eps_low: how far the ratio may fall below 1, >= 0; None = any.
        clip_eps_high: how far the ratio may rise above 1, >= 0; None = any.

    Returns:
        Bool, ``[B, T]``; False where an input is NaN.

    Raises:
        ValueError: if the shapes differ or a bound is negative.
    """
    check_shape("advantages", advantages, "ratio", ratio)
    for name, bound in (("clip_eps_low", clip_eps_low), ("clip_eps_high", clip_eps_high)):
        if bound is not None and not bound >= 0:
            raise ValueError(f"{name}={bound} is not a distance from 1; pass a number >= 0")
    low, high = (math.inf if bound is None else bound for bound in (clip_eps_low, clip_eps_high))
    rises = (advantages > 0) & (ratio > 1 + high)
    falls = (advantages < 0) & (ratio < 1 - low)
    return rises | falls
