"""Means over seeds with Student t intervals."""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

LEVEL = 0.95


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


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % Student t interval over the values that are numbers, one a seed.

    Paired where ``values`` are :func:`differences`. It covers the true mean in 95 % of cases where
    seeds vary as a normal distribution does, however few they are; of skewed values it covers less
    (five exponential ones: 88 %), and it may reach beyond the ends of a share, 0 and 1. One value
    has no interval: NaN.
    """
    numbers = [value for value in values if math.isfinite(value)]
    centre, error = mean(numbers), _standard_error(numbers)
    half = math.nan if math.isnan(error) else t_quantile(len(numbers) - 1) * error
    return Estimate(centre, centre - half, centre + half, len(numbers))


def p_value(values: Sequence[float]) -> float:
    """Two-sided p-value of a true mean of 0 by Student's t test; NaN for fewer than two numbers.

    Below .05 exactly where the interval of :func:`estimate` leaves out 0.
    """
    numbers = [value for value in values if math.isfinite(value)]
    centre, error = mean(numbers), _standard_error(numbers)
    if math.isnan(error):
        return math.nan
    if error == 0.0:
        return 1.0 if centre == 0.0 else 0.0
    return _outside(centre / error, len(numbers) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979); NaN stays NaN and does not count."""
    ranked = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected = [math.nan] * len(p_values)
    highest = 0.0
    for rank, (p, place) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p))
        corrected[place] = highest
    return corrected


@cache
def t_quantile(df: int) -> float:
    """What a Student t variable with ``df`` degrees of freedom exceeds in 2.5 % of cases."""
    low, high = 0.0, 13.0  # 12.7, of one degree, is the largest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _outside(middle, df) > 1 - LEVEL else (low, middle)
    return high


def _outside(t: float, df: int) -> float:
    """Probability that a Student t variable is farther from 0 than ``t``."""
    import mpmath  # type: ignore[import-untyped]  # comes with math-verify

    return float(mpmath.betainc(df / 2, 0.5, 0, df / (df + t * t), regularized=True))


def _standard_error(numbers: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two."""
    count = len(numbers)
    if count < 2:
        return math.nan
    centre = mean(numbers)
    squares = math.fsum((number - centre) ** 2 for number in numbers)
    return math.sqrt(squares / (count - 1) / count)


def differences(values: Mapping[int, float], baseline: Mapping[int, float]) -> dict[int, float]:
    """Value minus baseline by seed, of the seeds where both are numbers."""
    found = {seed: values[seed] - baseline[seed] for seed in values if seed in baseline}
    return {seed: difference for seed, difference in found.items() if math.isfinite(difference)}
