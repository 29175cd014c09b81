"""The clipped losses of PPO, per token; the caller reduces them.

Every mean is a sum over counted tokens divided by the *global* number of counted tokens of the
minibatch, so that accumulating micro-batches, on any number of devices, gives the gradient of one
big batch.
"""

import torch
from torch import Tensor


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the True entries; what stands elsewhere (NaN included) does not count."""
    return torch.where(mask, values, 0.0).sum()


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
