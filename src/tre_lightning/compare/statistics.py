"""Means over seeds with bootstrap intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

RESAMPLES = 10_000


class Estimate(NamedTuple):
    """A mean and its 95 % interval, both NaN where there is no value."""

    mean: float
    low: float
    high: float
    numbers: int  # values that are numbers


def mean(values: Sequence[float]) -> float:
    """Mean of the values that are numbers; NaN without any."""
    numbers = [value for value in values if math.isfinite(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def estimate(values: Sequence[float], resamples: int = RESAMPLES) -> Estimate:
    """Mean and percentile bootstrap interval over the values that are numbers.

    The resamples are the same in every call with as many values. One value has no interval: NaN.
    """
    numbers = [value for value in values if math.isfinite(value)]
    count = len(numbers)
    if count < 2:
        return Estimate(mean(numbers), math.nan, math.nan, count)
    rows = torch.randint(count, (resamples, count), generator=torch.Generator().manual_seed(0))
    means = torch.tensor(numbers, dtype=torch.float64)[rows].mean(dim=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(mean(numbers), low, high, count)


def differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """Value minus baseline by seed, of the seeds where both are numbers."""
    found = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    return {seed: difference for seed, difference in found.items() if math.isfinite(difference)}
