"""Intervals for what an evaluation measures. numpy only; every estimate comes with its uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


def wilson_interval(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion, (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Source: Wilson 1927.

    Raises ValueError for n = 0.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n} trials is no proportion")
    z, p = NormalDist().inv_cdf(0.5 + level / 2), successes / n
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def mean_interval(x: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """The mean of x with a bootstrap percentile interval."""
    return _bootstrap(np.asarray(x, dtype=np.float64), level, seed)


def paired_bootstrap(a: Sequence[float], b: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """mean(a - b) over pairs, with a bootstrap percentile interval over the pairs (Efron and Tibshirani 1993, chapter 13)."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are not pairs")
    return _bootstrap(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64), level, seed)


def win_rate(a: Sequence[float], b: Sequence[float], level: float = 0.95, seed: int = 0) -> Interval:
    """P(a > b) + P(a = b) / 2 over pairs, with a bootstrap percentile interval."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are not pairs")
    return _bootstrap((np.sign(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)) + 1) / 2, level, seed)


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams over all n-grams of words, over a set of texts: falls when texts repeat themselves (Li et al. 2016)."""
    grams = [tuple(words[i : i + n]) for words in map(str.split, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _bootstrap(x: np.ndarray, level: float, seed: int, resamples: int = 10_000) -> Interval:
    if len(x) == 0:
        raise ValueError("no values to take the mean of")
    generator = np.random.default_rng(seed)
    means = np.concatenate([x[generator.integers(len(x), size=(500, len(x)))].mean(axis=1) for _ in range(resamples // 500)])
    low, high = np.quantile(means, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(x.mean()), float(low), float(high))
