"""How sure a mean over examples is: percentile intervals of bootstrap resamples.

Examples are drawn anew with replacement, and the mean taken again, some thousand times; the
interval holds the middle part of these means. Efron 1979, https://doi.org/10.1214/aos/1176344552.
All models of a split are resampled alike, so that differences between them are paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

__all__ = ["LEVEL", "N_RESAMPLES", "Interval", "interval", "resampled_means"]

Floats = NDArray[np.float64]

N_RESAMPLES = 2000
LEVEL = 0.95

HELD = 4_000_000
"""Counts drawn at once: 32 MB."""


class Interval(msgspec.Struct, frozen=True):
    """Where the mean lies, with the confidence it was asked for."""

    low: float
    high: float


def resampled_means(values: Floats, *, n: int = N_RESAMPLES, seed: int = 0) -> Floats:
    """Return the means of `n` resamples ``(row, resample)`` of `values` ``(row, example)``.

    The same seed and number of examples draw the same resamples: rows are paired, whether they
    are given together or one by one. Holds 32 MB of counts at most.
    """
    random = np.random.default_rng(seed)
    n_examples = values.shape[1]
    means = np.empty((len(values), n))
    at_once = max(1, HELD // max(n_examples, 1))
    share = np.full(n_examples, 1.0 / n_examples)
    for first in range(0, n, at_once):
        counts = random.multinomial(n_examples, share, size=min(at_once, n - first))
        means[:, first : first + len(counts)] = values @ counts.T.astype(np.float64)
    means /= n_examples
    return means


def interval(means: Floats | Sequence[float], *, level: float = LEVEL) -> Interval:
    """Return the interval that holds the middle `level` of resampled means."""
    outside = (1.0 - level) / 2
    low, high = np.quantile(np.asarray(means, np.float64), [outside, 1.0 - outside])
    return Interval(float(low), float(high))
