"""Entropy methods: one file each, every one a callback of the hooks in ``hooks.py``."""

from tre_lightning.methods.entropy_bonus import EntropyBonus
from tre_lightning.methods.hooks import (
    LinearSchedule,
    LossTerm,
    Method,
    PolicyOutputs,
    Tokens,
    find_methods,
)
from tre_lightning.methods.trust_region import TrustRegionEntropy

__all__ = [
    "EntropyBonus",
    "LinearSchedule",
    "LossTerm",
    "Method",
    "PolicyOutputs",
    "Tokens",
    "TrustRegionEntropy",
    "find_methods",
]
