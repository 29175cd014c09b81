"""Correction for the mismatch of the engine that samples and the policy that is trained.

Both hold the same weights, but batch, round and order their sums differently, or work at another
precision. The policy gradient is then off-policy from its first step. Each token's policy loss is
weighed by the truncated ratio of the two probabilities.

Sources: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"
(https://fengyao.notion.site/off-policy-rl); Ionides 2008, "Truncated Importance Sampling". TRL's
``token_truncate`` mode and verl's token-level rollout correction are the same.
"""

from dataclasses import replace

from torch import Tensor

from tre_lightning.batches import TrainingBatch
from tre_lightning.methods.hooks import POLICY
from tre_lightning.training.losses import policy_ratio


def importance_weights(
    old_logprobs: Tensor, behaviour_logprobs: Tensor, max_weight: float
) -> Tensor:
    """Truncated importance weights min(p / q, ``max_weight``) of each token, ``[B, T]``.

    Args:
        old_logprobs: log p, of the policy that is trained, before the update, ``[B, T]``.
        behaviour_logprobs: log q, of what sampled, ``[B, T]``.
        max_weight: the largest weight, C.
    """
    return policy_ratio(old_logprobs, behaviour_logprobs).clamp(max=max_weight)


def corrected(batch: TrainingBatch, max_weight: float | None) -> TrainingBatch:
    """The batch with these weights in the policy loss; unchanged if ``max_weight`` is None."""
    if max_weight is None or batch.behaviour_logprobs is None:
        return batch
    weight = importance_weights(batch.old_logprobs, batch.behaviour_logprobs, max_weight)
    return replace(batch, weights={**batch.weights, POLICY: weight})
