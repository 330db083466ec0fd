"""Preference and value losses: closed-form gradients and identities."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.maths.preference_losses import dpo
from trimtab.maths.value_losses import clipped_squared_error, squared_error

number = st.floats(-20, 20)


def leaf(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64, requires_grad=True)


@given(number, number, st.floats(0.01, 2), st.floats(0, 0.49))
def test_dpo_gradient_and_sign_symmetry(a: float, b: float, beta: float, smoothing: float) -> None:
    chosen, rejected = leaf(a), leaf(b)
    dpo(chosen, rejected, beta, smoothing).sum().backward()
    p = 1 / (1 + math.exp(-beta * (a - b)))
    assert float(chosen.grad) == pytest.approx(beta * (p - (1 - smoothing)), abs=1e-9)
    assert float(chosen.grad) == pytest.approx(-float(rejected.grad), abs=1e-12)
    flipped = dpo(rejected.detach(), chosen.detach(), beta, 1 - smoothing)
    assert flipped.item() == pytest.approx(dpo(chosen, rejected, beta, smoothing).item(), abs=1e-9)


def test_dpo_at_the_reference_is_log_two() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert dpo(zero, zero, 0.1).tolist() == pytest.approx([math.log(2)] * 3)


def test_value_clipping_stops_what_has_moved_far_enough() -> None:
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.5, 0.5], requires_grad=True)
    loss = clipped_squared_error(values, old, returns, 0.2)
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 1.5])  # free; moved past the clip towards R; moved away from R
    assert (loss >= squared_error(values, returns) - 1e-9).all()
