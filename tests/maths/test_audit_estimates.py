"""Estimates of the audit: closed forms where there are some, planted truths inside their intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trimtab.maths.audit import correlation, label_noise, logistic_regression


def test_correlation_of_a_line_is_one_and_its_interval_is_fishers() -> None:
    assert correlation([1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0]).low == 1.0
    x, y = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    found = correlation(x, y)
    assert found.estimate == pytest.approx(0.8)
    assert found.high == pytest.approx(math.tanh(math.atanh(0.8) + 1.959964 / math.sqrt(2)), abs=1e-6)
    with pytest.raises(ValueError, match="vary"):
        correlation([1.0] * 4, x[:4])


def test_a_logistic_intercept_is_the_log_odds_with_its_standard_error() -> None:
    labels = [1.0] * 30 + [0.0] * 10
    (found,) = logistic_regression(np.ones((40, 1)), labels)
    assert found.estimate == pytest.approx(math.log(3), abs=1e-9)
    error = math.sqrt(1 / 30 + 1 / 10)
    assert found.high - found.estimate == pytest.approx(1.959964 * error, abs=1e-6)


def test_logistic_coefficients_do_not_depend_on_the_units() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(500, 2))
    labels = (draw.random(500) < 1 / (1 + np.exp(-x @ [1.0, -0.5]))).astype(float).tolist()
    one, scaled = logistic_regression(x, labels), logistic_regression(x * [1, 1000], labels)
    assert scaled[1].estimate * 1000 == pytest.approx(one[1].estimate)
    assert one[0].low < 1.0 < one[0].high
    assert one[1].low < -0.5 < one[1].high


@pytest.mark.parametrize("features", [[[1.0], [2.0], [3.0]], [[1.0, 2.0]] * 3, [[0.0]] * 3])
def test_what_has_no_finite_maximum_is_refused(features: list[list[float]]) -> None:
    with pytest.raises(ValueError, match=r"separated|same|zero|settle"):
        logistic_regression(np.array(features), [1.0, 1.0, 1.0])


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.2, 0.35])
def test_planted_label_noise_is_inside_its_interval(noise: float) -> None:
    draw = np.random.default_rng(1)
    d = draw.normal(size=3000) * 3
    prefers = draw.random(3000) < 1 / (1 + np.exp(-1.5 * d))
    flipped = draw.random(3000) < noise
    found = label_noise(np.where(prefers ^ flipped, d, -d).tolist())
    assert found.noise.low <= noise <= found.noise.high
    assert found.noise.high - found.noise.low < 0.1
    assert found.scale == pytest.approx(1.5, rel=0.6)


def test_noise_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    hits = 0
    for seed in range(40):
        draw = np.random.default_rng(seed)
        d = draw.normal(size=300) * 4
        true = (draw.random(300) < 1 / (1 + np.exp(-d))) ^ (draw.random(300) < 0.2)
        interval = label_noise(np.where(true, d, -d).tolist()).noise
        hits += interval.low <= 0.2 <= interval.high
    assert hits >= 34
