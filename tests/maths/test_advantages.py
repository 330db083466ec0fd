"""Credit assignment: limits of GAE, whitening fixtures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.maths.advantages import explained_variance, gae, rewards_to_go, whiten
from trimtab.maths.reductions import aggregate, to_column, to_rows


def rows(seed: int, n: int = 3, t: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.manual_seed(seed)
    return torch.randn(n, t, dtype=torch.float64, generator=generator), torch.randn(n, t, dtype=torch.float64, generator=generator)


@given(st.integers(0, 1000), st.floats(0.1, 1))
@settings(max_examples=30, deadline=None)
def test_lambda_zero_is_the_td_error_and_lambda_one_monte_carlo(seed: int, discount: float) -> None:
    rewards, values = rows(seed)
    next_values = torch.cat([values[:, 1:], torch.zeros(3, 1, dtype=torch.float64)], 1)
    assert torch.allclose(gae(rewards, values, discount, 0.0), rewards + discount * next_values - values, atol=1e-12)
    assert torch.allclose(gae(rewards, values, discount, 1.0), rewards_to_go(rewards, discount) - values, atol=1e-12)


def test_gae_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.8]])
    deltas = [0.1, 0.2, 0.2]
    expected = [deltas[0] + 0.95 * (deltas[1] + 0.95 * deltas[2]), deltas[1] + 0.95 * deltas[2], deltas[2]]
    assert gae(rewards, values, 1.0, 0.95)[0].tolist() == pytest.approx(expected)


def test_padding_behind_a_response_changes_nothing() -> None:
    rewards, values = rows(0)
    lengths = [2, 6, 4]
    ragged = [to_column(x, lengths) for x in (rewards, values)]
    padded = gae(to_rows(ragged[0], lengths), to_rows(ragged[1], lengths), 0.9, 0.8)
    for i, n in enumerate(lengths):
        alone = gae(rewards[i : i + 1, :n], values[i : i + 1, :n], 0.9, 0.8)
        assert torch.equal(padded[i, :n], alone[0])


def test_whitening_fixture() -> None:
    x = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]]).flatten()
    expected = [0.0508, 0.4381, 0.8254, 1.2127, 1.6000, 1.9873, 2.3746, 2.7619, 3.1492]
    assert whiten(x, shift_mean=False).tolist() == pytest.approx(expected, abs=1e-4)
    assert float(whiten(x).mean()) == pytest.approx(0, abs=1e-6)


def test_whitening_looks_at_the_mask_only() -> None:
    x, mask = torch.tensor([1.0, 2.0, 3.0, 1e6]), torch.tensor([True, True, True, False])
    assert whiten(x, mask)[:3].tolist() == pytest.approx(whiten(x[:3]).tolist())
    assert float(whiten(x, mask)[3]) == 0


def test_explained_variance_limits() -> None:
    returns = torch.tensor([1.0, 2.0, 4.0])
    assert float(explained_variance(returns, returns)) == 1
    assert float(explained_variance(torch.full((3,), 2.0), returns)) == 0
    assert float(explained_variance(returns, torch.ones(3))) == 0


def test_three_aggregations_are_three_objectives() -> None:
    terms = torch.tensor([1.0, 1.0, 1.0, 4.0])
    mask, index = torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 0, 1])
    sizes = {"tokens": 4, "responses": 2}
    assert float(aggregate(terms, mask, index, "token", **sizes)) == pytest.approx(7 / 4)
    assert float(aggregate(terms, mask, index, "sequence", **sizes)) == pytest.approx((1 + 4) / 2)
    assert float(aggregate(terms, mask, index, "fixed-length", **sizes, length=5)) == pytest.approx(7 / 10)
