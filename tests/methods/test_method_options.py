"""Options of methods that cannot work are refused in words that name them."""

import math
from typing import Any

import pytest

from tre_lightning.methods import (
    PAEC,
    SIREN,
    AdaptiveEntropy,
    AEnt,
    ClipCov,
    EntropyAdvantage,
    ForkingTokens,
    KLCov,
    LinearSchedule,
    Method,
    TrustRegionEntropy,
)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (AdaptiveEntropy, {"coef": -1.0}, r"\[mine\]\.coef=-1.0"),
        (AdaptiveEntropy, {"target": 0.0}, r"target=0.0 "),
        (AdaptiveEntropy, {"delta": -0.1}, r"delta=-0.1 "),
        (AdaptiveEntropy, {"delta": math.nan}, r"delta=nan "),
        (AdaptiveEntropy, {"coef": 0.2, "max_coef": 0.1}, r"max_coef=0.1 .*coef=0.2"),
        (AEnt, {"coef": -1.0}, r"\[mine\]\.coef=-1.0"),
        (AEnt, {"clamp_p": 1.0}, r"clamp_p=1.0 "),
        (AEnt, {"low": 0.6}, r"low=0.6 .*high=0.5"),
        (AEnt, {"low": -0.1}, r"low=-0.1 "),
        (AEnt, {"step": math.nan}, r"step=nan "),
        (AEnt, {"coef_min": 0.02}, r"coef_min=0.02 .*coef_max=0.01"),
        (AEnt, {"coef": 0.02}, r"coef=0.02 .*coef_max=0.01"),
        (AEnt, {"warmup": -1}, r"warmup=-1 "),
        (KLCov, {"coef": -1.0}, r"\[mine\]\.coef=-1\.0"),
        (
            KLCov,
            {"fraction": 0.0},
            r"\[mine\]\.fraction=0\.0 must be above 0 .*coef=0 switches it off",
        ),
        (KLCov, {"fraction": 1.5}, r"\[mine\]\.fraction=1\.5 must be .* at most 1"),
        (KLCov, {"fraction": math.nan}, r"\[mine\]\.fraction=nan"),
        (ClipCov, {"fraction": -0.1}, r"\[mine\]\.fraction=-0\.1 must lie in \[0, 1\]"),
        (ClipCov, {"fraction": math.nan}, r"\[mine\]\.fraction=nan"),
        (ClipCov, {"low": 5.0, "high": 5.0}, r"\[mine\]\.low=5\.0 must be below high=5\.0"),
        (ClipCov, {"high": math.nan}, r"\[mine\]\.low=1\.0 must be below high=nan"),
        (EntropyAdvantage, {"alpha": -0.1}, r"\[mine\]\.alpha=-0\.1 must be 0 \(off\) or positive"),
        (EntropyAdvantage, {"alpha": math.nan}, r"\[mine\]\.alpha=nan"),
        (EntropyAdvantage, {"kappa": 1.0}, r"\[mine\]\.kappa=1\.0 must be above 1"),
        (EntropyAdvantage, {"kappa": math.nan}, r"\[mine\]\.kappa=nan"),
        (ForkingTokens, {"fraction": 0.0}, r"\[mine\]\.fraction=0\.0 must be above 0"),
        (ForkingTokens, {"fraction": 1.1}, r"\[mine\]\.fraction=1\.1 must be .* at most 1"),
        (ForkingTokens, {"fraction": math.nan}, r"\[mine\]\.fraction=nan"),
        (
            ForkingTokens,
            {"average_over": "some"},
            r"\[mine\]\.average_over='some' .* 'all' or 'selected'",
        ),
        (PAEC, {"coef": -1.0}, r"\[mine\]\.coef=-1.0"),
        (PAEC, {"top_p": 0.0}, r"top_p=0.0"),
        (PAEC, {"fraction": 1.5}, r"\[mine\]\.fraction=1.5 "),
        (PAEC, {"mix": -0.5}, r"mix=-0.5 "),
        (PAEC, {"anchor_iterations": 0}, r"anchor_iterations=0 "),
        (PAEC, {"floor_fraction": 1.5}, r"floor_fraction=1.5 "),
        (PAEC, {"floor_fraction": math.nan}, r"floor_fraction=nan "),
        (SIREN, {"coef": -1.0}, r"\[mine\]\.coef=-1.0"),
        (SIREN, {"top_p": 1.0}, r"top_p=1.0"),
        (SIREN, {"fraction": 0.0}, r"\[mine\]\.fraction=0.0 "),
        (SIREN, {"fraction": math.nan}, r"\[mine\]\.fraction=nan "),
        (SIREN, {"within": "batch"}, r"\[mine\]\.within=batch .*rollout, response"),
        (TrustRegionEntropy, {"top_k": 2, "min_size": 2}, r"\[mine\]\.min_size=2"),
        (TrustRegionEntropy, {"min_p": 1.0}, r"\[mine\]\.min_p=1\.0 must lie between 0 and 1"),
        (TrustRegionEntropy, {"min_p": LinearSchedule(0.1, 0.0, 3)}, r"\[mine\]\.min_p=0\.0 "),
        (TrustRegionEntropy, {"min_p": 0.1, "top_p": 0.9}, r"\[mine\]: give exactly one"),
        (TrustRegionEntropy, {"min_p": 0.1, "top_k": 2}, r"\[mine\]: give exactly one"),
        (
            TrustRegionEntropy,
            {"top_p": 0.9, "min_size": 2, "region_of": "behaviour"},
            r"\[mine\]\.min_size=2",
        ),
        (TrustRegionEntropy, {"top_p": 0.9, "min_size": 0}, r"\[mine\]\.min_size=0"),
        (TrustRegionEntropy, {"top_p": 0.9, "max_size": 0}, r"\[mine\]\.max_size=0"),
        (TrustRegionEntropy, {"top_p": 0.9, "region_of": "mine"}, r"\[mine\]\.region_of=mine"),
        (TrustRegionEntropy, {"top_p": LinearSchedule(0.9, 1.0, 3)}, "top_p=1.0"),
        (TrustRegionEntropy, {"top_k": LinearSchedule(0.2, 3, 3)}, "top_k=0"),
        (TrustRegionEntropy, {"top_k": 2, "top_p": LinearSchedule(0.9, 0.5, 3)}, "exactly one"),
    ],
)
def test_bad_options_are_refused(
    method: type[Method], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options, name="mine")
