"""Correction for the mismatch of the engine that samples and the policy that is trained.

Both hold the same weights, but batch, round and order their sums differently, or work at another
precision. The policy gradient is then off-policy from its first step. Each token's policy loss is
weighed by the ratio of the two probabilities, within bounds. Beyond them the ratio is replaced by
the bound (truncated importance sampling), or the token counts no more (IcePop), or the whole
response does not, where the geometric mean of its ratios is beyond them.

Sources: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
(https://fengyao.notion.site/off-policy-rl); Ionides 2008, "Truncated Importance Sampling". TRL's
``token_truncate`` mode and verl's token-level rollout correction are ``truncate`` with an upper
bound. ``mask`` is IcePop (https://hijkzzz.notion.site/online-ice-pop) and ``mask_response`` the
sequence mask of "When Speed Kills Stability" (Liu et al. 2025), with the formulas and the usual
bounds, 0.5 to 5 and 0.999 to 1.002, of NVIDIA's NeMo RL (commit 7ea279a): there "icepop" and
"seq-mask-tis".

Deviation: both bounds may be left out, and the divisor of the loss stays the number of all counted
tokens, masked ones included.
"""

from dataclasses import replace

import torch
from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.methods.hooks import POLICY
from tre_lightning.sampling.options import RolloutArgs
from tre_lightning.training.losses import policy_ratio


def importance_weights(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, mask: Tensor, how: RolloutArgs
) -> Tensor:
    """Importance weight of each token, p / q within its bounds, ``[B, T]``.

    Args:
        old_logprobs: log p, of the policy that is trained, before the update, ``[B, T]``.
        behaviour_logprobs: log q, of what sampled, ``[B, T]``.
        mask: True where a token counts, ``[B, T]``.
        how: the bounds and what is done beyond them.
    """
    ratio = policy_ratio(old_logprobs, behaviour_logprobs)
    least, most = how.min_importance_weight, how.max_importance_weight
    if how.importance_correction == "truncate":
        return ratio.clamp(least, most)
    judged = ratio
    if how.importance_correction == "mask_response":
        logs = (old_logprobs - behaviour_logprobs).masked_fill(~mask, 0.0)
        mean = logs.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        judged = mean.exp()
    kept = torch.ones_like(judged, dtype=torch.bool)
    if least is not None:
        kept &= judged >= least
    if most is not None:
        kept &= judged <= most
    return ratio.where(kept, 0.0)


def corrected(batch: TrainingBatch, how: RolloutArgs) -> TrainingBatch:
    """The batch with these weights in the policy loss; unchanged without bounds."""
    if not how.corrects or batch.behaviour_logprobs is None:
        return batch
    old, behaviour = batch.old_logprobs, batch.behaviour_logprobs
    weight = importance_weights(old, behaviour, batch.response_mask, how)
    return replace(batch, weights={**batch.weights, POLICY: weight})
