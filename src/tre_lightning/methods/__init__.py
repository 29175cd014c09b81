"""Entropy methods, one file each; every one is a callback with the hooks of ``hooks.py``."""

from tre_lightning.methods.adaptive_entropy import AdaptiveEntropy
from tre_lightning.methods.aent import AEnt
from tre_lightning.methods.covariance import ClipCov, KLCov
from tre_lightning.methods.entrocraft import Entrocraft
from tre_lightning.methods.entropy_advantage import EntropyAdvantage
from tre_lightning.methods.entropy_bonus import EntropyBonus
from tre_lightning.methods.forking_tokens import ForkingTokens
from tre_lightning.methods.hooks import (
    LinearSchedule,
    LossTerm,
    Method,
    Tokens,
    find_methods,
)
from tre_lightning.methods.lp_reg import LpReg
from tre_lightning.methods.paec import PAEC
from tre_lightning.methods.positive_advantage import PositiveAdvantageReweighting
from tre_lightning.methods.repo import REPO
from tre_lightning.methods.siren import SIREN
from tre_lightning.methods.trust_region import TrustRegionEntropy
from tre_lightning.methods.weighted_reinforce import WeightedReinforce
from tre_lightning.ops import PolicyOutputs

__all__ = [
    "PAEC",
    "REPO",
    "SIREN",
    "AEnt",
    "AdaptiveEntropy",
    "ClipCov",
    "Entrocraft",
    "EntropyAdvantage",
    "EntropyBonus",
    "ForkingTokens",
    "KLCov",
    "LinearSchedule",
    "LossTerm",
    "LpReg",
    "Method",
    "PolicyOutputs",
    "PositiveAdvantageReweighting",
    "Tokens",
    "TrustRegionEntropy",
    "WeightedReinforce",
    "find_methods",
]
