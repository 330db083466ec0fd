"""Value losses: what clipping does."""

from __future__ import annotations

import pytest
import torch

from trimtab.maths.value_losses import clipped_squared_error, squared_error


def test_value_clipping_stops_what_has_moved_far_enough() -> None:
    old, returns = torch.tensor([0.0, 0.0, 0.0]), torch.tensor([1.0, 1.0, -1.0])
    values = torch.tensor([0.1, 0.5, 0.5], requires_grad=True)
    loss = clipped_squared_error(values, old, returns, 0.2)
    loss.sum().backward()
    assert values.grad.tolist() == pytest.approx([-0.9, 0.0, 1.5])  # free; moved past the clip towards R; moved away from R
    assert (loss >= squared_error(values, returns) - 1e-9).all()
