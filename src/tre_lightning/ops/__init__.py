"""Fused ops: log-probabilities and entropies of tokens, from logits or from hidden states."""

from tre_lightning.entropy import Region
from tre_lightning.ops.functions import (
    LogprobsAndEntropy,
    PolicyOutputs,
    fused_linear_logprobs_and_entropy,
    logprobs_and_entropy,
)

__all__ = [
    "LogprobsAndEntropy",
    "PolicyOutputs",
    "Region",
    "fused_linear_logprobs_and_entropy",
    "logprobs_and_entropy",
]
