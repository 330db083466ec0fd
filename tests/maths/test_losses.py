"""Reward and value losses: closed-form gradients and identities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.maths.reward_losses import bradley_terry, centring
from trimtab.maths.value_losses import clipped_squared_error, squared_error

number = st.floats(-20, 20)


def leaf(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64, requires_grad=True)


@given(number, number, st.floats(0, 5))
def test_bradley_terry_gradient_and_shift_invariance(a: float, b: float, margin: float) -> None:
    chosen, rejected = leaf(a), leaf(b)
    loss = bradley_terry(chosen, rejected, margin)
    loss.sum().backward()
    p = 1 / (1 + math.exp(-(a - b - margin)))
    assert float(chosen.grad) == pytest.approx(p - 1, abs=1e-12)
    assert float(rejected.grad) == pytest.approx(1 - p, abs=1e-12)
    assert bradley_terry(chosen + 3, rejected + 3, margin).item() == pytest.approx(loss.item(), abs=1e-9)


def test_centring_pulls_the_sum_to_zero_and_leaves_the_difference() -> None:
    chosen, rejected = leaf(2.0), leaf(1.0)
    centring(chosen, rejected).sum().backward()
    assert float(chosen.grad) == float(rejected.grad) == 6.0


def test_value_clipping_stops_what_has_moved_far_enough() -> None:
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.5, 0.5], requires_grad=True)
    loss = clipped_squared_error(values, old, returns, 0.2)
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 1.5])  # free; moved past the clip towards R; moved away from R
    assert (loss >= squared_error(values, returns) - 1e-9).all()
