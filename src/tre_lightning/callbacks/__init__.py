"""Callbacks: entropy methods, checkpoints, progress and the closing summary."""

from tre_lightning.callbacks.loss_term import (
    EntropyBonus,
    LossTerm,
    PolicyOutputs,
    TrustRegionEntropy,
)

__all__ = ["EntropyBonus", "LossTerm", "PolicyOutputs", "TrustRegionEntropy"]
