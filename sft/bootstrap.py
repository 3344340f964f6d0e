"""Intervals by the paired bootstrap: rows are drawn again with replacement, the same for all models (Efron, 1979)."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
Floats = NDArray[np.float64]
Mean = Callable[[NDArray[np.intp]], Floats]
"""Row numbers [resamples, rows] -> the score of each resample."""


class Interval(NamedTuple):
    """A score with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def drawn(rows: int, seed: int, resamples: int = RESAMPLES) -> NDArray[np.intp]:
    """Row numbers [resamples, rows], drawn with replacement."""
    return np.random.default_rng(seed).integers(0, rows, (resamples, rows))


def mean_of(values: list[float]) -> Mean:
    """The mean of a score that each row has."""
    array = np.array(values, dtype=np.float64)
    return lambda index: array[index].mean(-1)


def ratio_of(numerator: Floats, denominator: Floats, then: Callable[[Floats], Floats] = lambda x: x) -> Mean:
    """A mean over tokens, of which rows have different numbers."""
    return lambda index: then(numerator[index].sum(-1) / denominator[index].sum(-1))


def perplexity_of(loss: Floats) -> Floats:
    """Bounded where a model is so wrong that it would leave the range of numbers."""
    return np.exp(np.minimum(loss, 700.0))


def percentiles(value: float, resampled: Floats) -> Interval:
    """The usual case: between which values 95 % of the resamples lie."""
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def by_standard_error(value: float, resampled: Floats) -> Interval:
    """1.96 standard errors to both sides, for a score that takes long to compute: a hundred resamples give a standard
    error well, and percentiles badly (Efron and Tibshirani, 1993, An Introduction to the Bootstrap, 6.4)."""
    half = 1.96 * float(resampled.std(ddof=1))
    return Interval(value, value - half, value + half)


def with_intervals(
    by_side: Mapping[str, Mean], rows: NDArray[np.intp], interval: Callable[[float, Floats], Interval] = percentiles
) -> dict[str, dict[str, float]]:
    """Side -> value, low and high on resampled rows; `difference` too, tuned minus base, where both are there."""
    everything = np.arange(rows.shape[1])[None]
    values = {side: (float(mean(everything)[0]), mean(rows)) for side, mean in by_side.items()}
    if "base" in values:
        (base, bases), (tuned, tuneds) = values["base"], values["tuned"]
        values["difference"] = (tuned - base, tuneds - bases)
    return {side: interval(value, resampled)._asdict() for side, (value, resampled) in values.items()}
