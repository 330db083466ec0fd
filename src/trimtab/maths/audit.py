"""What a set of judgements and a reward model's scores say about each other. numpy only; estimates come with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from trimtab.maths.statistics import Interval


@dataclass(frozen=True)
class NoiseFit:
    """The share of flipped labels, and the scale the scores have as log-odds of the true preference."""

    noise: Interval
    scale: float


def correlation(x: Sequence[float], y: Sequence[float], n: int | None = None, level: float = 0.95) -> Interval:
    """Pearson's r with Fisher's interval, tanh(atanh r -+ z / sqrt(n - 3)). n: independent observations, if fewer than values.

    Raises ValueError for fewer than 4 observations, or where one side does not vary.
    """
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(a) if n is None else n
    if n < 4 or len(a) != len(b) or not (a.std() > 0 and b.std() > 0):
        raise ValueError("a correlation needs at least 4 observations of two things that vary")
    r = float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))
    if abs(r) > 1 - 1e-12:
        return Interval(r, r, r)
    reach = NormalDist().inv_cdf(0.5 + level / 2) / math.sqrt(n - 3)
    return Interval(r, math.tanh(math.atanh(r) - reach), math.tanh(math.atanh(r) + reach))


def logistic_regression(features: np.ndarray, labels: Sequence[float], level: float = 0.95) -> list[Interval]:
    """Maximum-likelihood coefficients w of P(label = 1) = sigma(w . features), with Wald intervals from the Fisher information.

    features [n, k]; a constant column is an intercept. By Newton's method on standardised columns. Raises ValueError where
    there is no finite maximum: a column that does not vary, columns that say the same, or labels they separate perfectly.
    """
    y, scale = np.asarray(labels, dtype=np.float64), np.sqrt((features**2).mean(axis=0))
    if not (scale > 0).all():
        raise ValueError("a feature is always zero")
    x, w = features / scale, np.zeros(features.shape[1])
    for _ in range(100):
        p = _sigma(x @ w)
        information = (x * (p * (1 - p))[:, None]).T @ x
        if np.linalg.cond(information) > 1e10 or np.abs(w).max() > 100:
            raise ValueError("the labels are separated perfectly, or two features say the same")
        step = np.linalg.solve(information, x.T @ (y - p))
        w = w + step * min(1.0, 5 / max(float(np.abs(step).max()), 1e-12))
        if np.abs(step).max() < 1e-10:
            break
    else:
        raise ValueError("the fit does not settle: the labels are almost separated")
    reach = NormalDist().inv_cdf(0.5 + level / 2) * np.sqrt(np.diag(np.linalg.inv(information)))
    return [Interval(float(a), float(a - b), float(a + b)) for a, b in zip(w / scale, reach / scale, strict=True)]


def label_noise(margins: Sequence[float], level: float = 0.95) -> NoiseFit:
    """The share e of flipped labels, by maximum likelihood with its profile-likelihood interval.

    margins: score of what was preferred minus score of what was not. Model, for scores that are right but for their scale s:

        P(this was preferred) = (1 - e) sigma(s d) + e (1 - sigma(s d)),      0 <= e < 1/2, s > 0

    Ordinary indecision between near equals is in sigma; e is what remains of disagreement however large the margin is.
    The interval holds every e whose profile likelihood is within chi^2_1(level) / 2 of the best. Raises ValueError for fewer
    than 10 margins, or none but zeros.
    """
    d = np.asarray(margins, dtype=np.float64)
    unit = float(np.abs(d).mean())
    if len(d) < 10 or unit == 0:
        raise ValueError("label noise needs at least 10 pairs whose scores differ")
    grid, log_scales = np.linspace(0, 0.5, 101)[:-1], np.linspace(-6, 6, 121)
    chosen = _sigma(np.exp(log_scales)[:, None] * d / unit)
    fits = [_peak(log_scales, np.log(np.maximum(e + (1 - 2 * e) * chosen, 1e-300)).sum(axis=1)) for e in grid]
    profile = np.array([likelihood for _, likelihood in fits])
    best = int(profile.argmax())
    inside = grid[profile >= profile[best] - NormalDist().inv_cdf(0.5 + level / 2) ** 2 / 2]
    return NoiseFit(Interval(float(grid[best]), float(inside[0]), float(inside[-1])), math.exp(fits[best][0]) / unit)


def _peak(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Where a smooth function on an even grid is largest, and how large: the top of the parabola through the three highest points."""
    i = int(np.clip(y.argmax(), 1, len(y) - 2))
    slope, bend = (y[i + 1] - y[i - 1]) / 2, y[i + 1] - 2 * y[i] + y[i - 1]
    shift = float(np.clip(-slope / bend, -1, 1)) if bend < 0 else 0.0
    return float(x[i] + shift * (x[1] - x[0])), float(y[i] + shift * slope + shift * shift * bend / 2)


def _sigma(x: np.ndarray) -> np.ndarray:
    half: np.ndarray = np.tanh(x / 2)
    return (1 + half) / 2
