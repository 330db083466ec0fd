"""Credit assignment: limits of GAE, whitening fixtures, and every derivative in closed form."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.maths.advantages import (
    explained_variance,
    gae,
    group_deviation,
    group_mean,
    leave_one_out,
    moments,
    n_step,
    rewards_to_go,
    whiten,
)
from trimtab.maths.reductions import to_column, to_rows


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


def jacobian(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, x)  # type: ignore[no-any-return, no-untyped-call]


def distances(n: int) -> Tensor:
    """k - t for every pair of times."""
    at = torch.arange(n)
    return at[None, :] - at[:, None]


@given(st.integers(0, 1000), st.floats(0.1, 1), st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_gae_derivatives(seed: int, discount: float, lambda_: float) -> None:
    rewards, values = rows(seed, 1, 5)
    k = distances(5)
    decay = torch.where(k >= 0, (discount * lambda_) ** k.clamp(min=0).double(), 0.0)
    by_reward = jacobian(lambda r: gae(r[None], values, discount, lambda_)[0], rewards[0])
    assert torch.allclose(by_reward, decay, atol=1e-12)
    by_value = jacobian(lambda v: gae(rewards, v[None], discount, lambda_)[0], values[0])
    shifted = torch.cat([torch.zeros(5, 1, dtype=torch.float64), decay[:, :-1]], 1)  # v_k is in delta_k and in delta_{k - 1}
    assert torch.allclose(by_value, discount * shifted - decay, atol=1e-12)


@given(st.integers(0, 1000), st.floats(0.1, 1), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_n_step_is_its_sum_and_so_are_its_derivatives(seed: int, discount: float, n: int) -> None:
    rewards, values = rows(seed, 1, 5)
    found, k = n_step(rewards, values, discount, n)[0], distances(5)
    for t in range(5):
        steps = sum(discount**j * float(rewards[0, t + j]) for j in range(min(n, 5 - t)))
        later = discount**n * float(values[0, t + n]) if t + n < 5 else 0.0
        assert float(found[t]) == pytest.approx(steps + later - float(values[0, t]), abs=1e-12)
    by_reward = jacobian(lambda r: n_step(r[None], values, discount, n)[0], rewards[0])
    assert torch.allclose(by_reward, torch.where((k >= 0) & (k < n), discount ** k.clamp(min=0).double(), 0.0), atol=1e-12)
    by_value = jacobian(lambda v: n_step(rewards, v[None], discount, n)[0], values[0])
    assert torch.allclose(by_value, (k == n) * discount**n - (k == 0).double(), atol=1e-12)


@given(st.integers(0, 1000), st.floats(0.1, 1))
@settings(max_examples=30, deadline=None)
def test_n_step_reaches_from_the_td_error_to_the_return(seed: int, discount: float) -> None:
    rewards, values = rows(seed)
    assert torch.allclose(n_step(rewards, values, discount, 1), gae(rewards, values, discount, 0.0), atol=1e-12)
    for n in (6, 7, 100):
        assert torch.allclose(n_step(rewards, values, discount, n), rewards_to_go(rewards, discount) - values, atol=1e-12)


@given(st.integers(0, 1000), st.floats(0.1, 1))
@settings(max_examples=20, deadline=None)
def test_reward_to_go_is_the_reward_and_the_discounted_rest(seed: int, discount: float) -> None:
    rewards, _ = rows(seed)
    returns, k = rewards_to_go(rewards, discount), distances(6)
    assert torch.allclose(returns[:, :-1], rewards[:, :-1] + discount * returns[:, 1:], atol=1e-12)
    derivative = jacobian(lambda r: rewards_to_go(r[None], discount)[0], rewards[0])
    assert torch.allclose(derivative, torch.where(k >= 0, discount ** k.clamp(min=0).double(), 0.0), atol=1e-12)


grouped = st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=12)


def columns(cells: list[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    """Values and groups, which are numbered without gaps."""
    names = sorted({group for group, _ in cells})
    return torch.tensor([x for _, x in cells], dtype=torch.float64), torch.tensor([names.index(group) for group, _ in cells])


@given(grouped)
@settings(max_examples=60, deadline=None)
def test_groups_against_loops(cells: list[tuple[int, float]]) -> None:
    x, group = columns(cells)
    mean, others, spread = group_mean(x, group), leave_one_out(x, group), group_deviation(x, group)
    for i, g in enumerate(group):
        mine = x[group == g]
        rest = torch.cat([x[:i][group[:i] == g], x[i + 1 :][group[i + 1 :] == g]])
        assert float(mean[i]) == pytest.approx(float(mine.mean()), abs=1e-9)
        assert float(others[i]) == pytest.approx(float(rest.mean()) if len(rest) else 0.0, abs=1e-9)
        assert float(spread[i]) == pytest.approx(float(mine.std()) if len(mine) > 1 else 0.0, abs=1e-6)


@given(grouped)
@settings(max_examples=40, deadline=None)
def test_group_derivatives(cells: list[tuple[int, float]]) -> None:
    x, group = columns(cells)
    same, size = group[:, None] == group[None, :], torch.bincount(group)[group]
    eye = torch.eye(len(x), dtype=torch.bool)
    assert torch.allclose(jacobian(lambda v: group_mean(v, group), x), same / size[:, None].double(), atol=1e-12)
    expected = (same & ~eye) / (size - 1).clamp(min=1)[:, None].double()
    assert torch.allclose(jacobian(lambda v: leave_one_out(v, group), x), expected, atol=1e-12)
    varied = group_deviation(x, group) > 0.1  # at a spread of zero there is no derivative
    if not bool(varied.any()):
        return
    x, group = x[varied], torch.unique(group[varied], return_inverse=True)[1]
    size, spread, centred = torch.bincount(group)[group], group_deviation(x, group), x - group_mean(x, group)
    expected = (group[:, None] == group[None, :]) * centred[None, :] / ((size - 1) * spread)[:, None]
    assert torch.allclose(jacobian(lambda v: group_deviation(v, group), x), expected, atol=1e-9)


@given(st.integers(2, 8), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one(size: int, seed: int) -> None:
    x, group = torch.randn(3 * size, dtype=torch.float64, generator=torch.manual_seed(seed)), torch.arange(3).repeat_interleave(size)
    assert torch.allclose(x - leave_one_out(x, group), size / (size - 1) * (x - group_mean(x, group)), atol=1e-12)


masked = st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=3, max_size=10).filter(lambda c: sum(own for _, own in c) >= 2)


@given(masked, st.floats(-10, 10), st.floats(0.1, 10))
@settings(max_examples=60, deadline=None)
def test_whitened_is_centred_of_spread_one_and_does_not_see_scale(cells: list[tuple[float, bool]], shift: float, scale: float) -> None:
    x, mask = torch.tensor([v for v, _ in cells], dtype=torch.float64), torch.tensor([own for _, own in cells])
    assume(float(x[mask].std()) > 0.1)
    white = whiten(x, mask)
    assert float(white[mask].mean()) == pytest.approx(0, abs=1e-9)
    assert float(white[mask].std(correction=0)) == pytest.approx(1, abs=1e-5)
    assert not white[~mask].any()
    assert torch.allclose(whiten(scale * x + shift, mask), white, atol=1e-4)
    mean, spread = moments(x, mask)
    assert torch.allclose(whiten(x, mask, shift_mean=False), (white + mean) * mask, atol=1e-9)
    assert float(spread) == pytest.approx(float(x[mask].var(correction=0) + 1e-8) ** 0.5)


def test_whitening_derivatives() -> None:
    x, mask = torch.tensor([0.3, -1.2, 5.0, 2.0, 0.7], dtype=torch.float64), torch.tensor([True, True, False, True, True])
    own, n = mask.double(), 4
    mean, spread = moments(x, mask)
    centred = (x - mean) * own
    assert torch.allclose(jacobian(lambda v: moments(v, mask)[0], x), own / n, atol=1e-12)
    assert torch.allclose(jacobian(lambda v: moments(v, mask)[1], x), centred / (n * spread), atol=1e-12)
    expected = (torch.diag(own) - own[:, None] * own[None, :] / n) / spread - centred[:, None] * centred[None, :] / (n * spread**3)
    assert torch.allclose(jacobian(lambda v: whiten(v, mask), x), expected, atol=1e-12)


def test_whitening_fixture_of_a_masked_row() -> None:
    """The same nine numbers with others between them that are masked."""
    x = torch.tensor([1.2, 1.3, 9.9, 1.4, 1.5, 1.6, -4.0, 1.7, 1.8, 1.9, 2.0, 77.0], dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, True, False, True, True, True, True, False])
    expected = [0.0508, 0.4381, 0.0, 0.8254, 1.2127, 1.6000, 0.0, 1.9873, 2.3746, 2.7619, 3.1492, 0.0]
    assert whiten(x, mask, shift_mean=False).tolist() == pytest.approx(expected, abs=1e-4)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=3, max_size=10), st.floats(-5, 5))
@settings(max_examples=50, deadline=None)
def test_explained_variance_is_at_most_one_and_sees_no_constant(pairs: list[tuple[float, float]], shift: float) -> None:
    values, returns = (torch.tensor(x, dtype=torch.float64) for x in zip(*pairs, strict=True))
    assume(float(returns.std()) > 0.1)
    found = explained_variance(values, returns)
    assert float(found) <= 1 + 1e-12
    assert float(explained_variance(values + shift, returns)) == pytest.approx(float(found), abs=1e-6)
    error = returns - values
    expected = 2 * (error - error.mean()) / (len(error) * returns.var(correction=0))
    assert torch.allclose(jacobian(lambda v: explained_variance(v, returns), values), expected, atol=1e-9)
