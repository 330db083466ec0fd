"""Value losses: closed-form gradients and identities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trimtab.maths.value_losses import clipped_squared_error, squared_error

number = st.floats(-20, 20)


def leaf(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64, requires_grad=True)


def test_value_clipping_stops_what_has_moved_far_enough() -> None:
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.5, 0.5], requires_grad=True)
    loss = clipped_squared_error(values, old, returns, 0.2)
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 1.5])  # free; moved past the clip towards R; moved away from R
    assert (loss >= squared_error(values, returns) - 1e-9).all()


@given(number, number)
@settings(max_examples=50, deadline=None)
def test_squared_error_gradient_is_the_error_and_the_return_gets_none(v: float, r: float) -> None:
    value, target = leaf(v), leaf(r)
    loss = squared_error(value, target)
    gradient, none = torch.autograd.grad(loss.sum(), (value, target), allow_unused=True)
    assert loss.item() == pytest.approx((v - r) ** 2 / 2)
    assert float(gradient) == pytest.approx(v - r)
    assert none is None  # semi-gradient: the critic does not move its own target


@given(number, number, number, st.floats(0.01, 5))
@settings(max_examples=150, deadline=None)
def test_clipped_error_is_the_larger_one_and_its_gradient_the_error_or_nothing(v: float, old: float, r: float, clip: float) -> None:
    near = min(max(v, old - clip), old + clip)
    free = (v - r) ** 2 >= (near - r) ** 2
    assume(abs(abs(v - old) - clip) > 1e-6 and (near == v or abs((v - r) ** 2 - (near - r) ** 2) > 1e-6))
    value = leaf(v)
    loss = clipped_squared_error(value, torch.tensor([old], dtype=torch.float64), torch.tensor([r], dtype=torch.float64), clip)
    (gradient,) = torch.autograd.grad(loss.sum(), value)
    assert loss.item() == pytest.approx(max((v - r) ** 2, (near - r) ** 2) / 2)
    assert float(gradient) == pytest.approx(v - r if free else 0.0, abs=1e-9)


@given(number, number, number)
@settings(max_examples=30, deadline=None)
def test_a_clip_that_is_wide_enough_is_none(v: float, old: float, r: float) -> None:
    columns = [torch.tensor([x], dtype=torch.float64) for x in (v, old, r)]
    assert torch.allclose(clipped_squared_error(*columns, 100.0), squared_error(columns[0], columns[2]), atol=1e-10)
