"""Best-of-n on finite sets against enumeration, the golden table, and what the estimates promise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.maths.best_of_n import best_of_n_logprobs, expected_gold, kl_bound, kl_divergence, kl_estimate, win_rate

GOLDEN = {  # n: KL of best-of-n among N equally probable responses, in nats
    10: {2: 0.1893, 4: 0.6288, 16: 1.7331, 64: 2.2935, 256: 2.3026, 1000: 2.3026},
    100: {2: 0.1931, 4: 0.6362, 16: 1.8340, 64: 3.1576, 256: 4.3137, 1000: 4.6047},
    4096: {2: 0.1931, 4: 0.6363, 16: 1.8351, 64: 3.1745, 256: 4.5489, 1000: 5.9063},
}
BOUND = {2: 0.1931, 4: 0.6363, 8: 1.2044, 16: 1.8351, 32: 2.4970, 64: 3.1745, 128: 3.8598, 256: 4.5491, 512: 5.2403, 1000: 5.9088}


def policy(seed: int, responses: int, spread: float, levels: int = 10**6) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and rewards on so many levels (few make ties)."""
    generator = torch.manual_seed(seed)
    logprobs = torch.log_softmax(spread * torch.randn(responses, dtype=torch.float64, generator=generator), 0)
    return logprobs, torch.randint(0, levels, (responses,), generator=generator).double()


def enumerated(logprobs: torch.Tensor, rewards: torch.Tensor, n: int) -> torch.Tensor:
    """pi_n by going through all draws, keeping the first of several best."""
    best = torch.zeros(len(logprobs), dtype=torch.float64)
    for draw in itertools.product(range(len(logprobs)), repeat=n):
        best[max(draw, key=lambda i: float(rewards[i]))] += logprobs[list(draw)].sum().exp()
    return best


POLICIES = (
    st.integers(0, 10_000),
    st.integers(2, 12),
    st.floats(0, 6),
    st.sampled_from([1, 2, 4, 10**6]),
    st.sampled_from([1, 2, 7, 64, 4096]),
)


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_table(size: int) -> None:
    same = torch.zeros(size, dtype=torch.float64)
    found = {n: round(float(kl_divergence(same, torch.arange(size).double(), n)), 4) for n in GOLDEN[size]}
    assert found == GOLDEN[size]


def test_golden_bound() -> None:
    assert {n: round(kl_bound(n), 4) for n in BOUND} == BOUND
    assert kl_bound(60_000) == pytest.approx(10.0021, abs=5e-5)
    assert kl_bound(1) == 0


@pytest.mark.parametrize("levels", [2, 3, 10**6])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_distribution_is_that_of_all_draws(levels: int, n: int) -> None:
    logprobs, rewards = policy(3, 4, 1.0, levels)
    assert torch.allclose(best_of_n_logprobs(logprobs, rewards, n).exp(), enumerated(logprobs, rewards, n), atol=1e-12)


@given(*POLICIES)
@settings(max_examples=150, deadline=None)
def test_kl_lies_below_the_mean_estimate_and_that_below_the_bound(seed: int, size: int, spread: float, levels: int, n: int) -> None:
    logprobs, rewards = policy(seed, size, spread, levels)
    best = best_of_n_logprobs(logprobs, rewards, n)
    exact, estimate = float(kl_divergence(logprobs, rewards, n)), float((best.exp() * kl_estimate(logprobs, n)).sum())
    assert float(best.exp().sum()) == pytest.approx(1, abs=1e-9)
    assert -1e-9 <= exact <= estimate + 1e-9
    assert estimate <= kl_bound(n) + 1e-9


@given(*POLICIES)
@settings(max_examples=60, deadline=None)
def test_only_the_order_of_rewards_counts_and_more_draws_win_more(seed: int, size: int, spread: float, levels: int, n: int) -> None:
    logprobs, rewards = policy(seed, size, spread, levels)
    assert torch.equal(best_of_n_logprobs(logprobs, rewards, n), best_of_n_logprobs(logprobs, torch.exp(rewards / 1e6) - 5, n))
    wins = float(win_rate(logprobs, rewards, n))
    assert 0.5 - 1e-9 <= wins <= n / (n + 1) + 1e-9
    assert wins <= float(win_rate(logprobs, rewards, n + 1)) + 1e-9


def test_equal_rewards_change_nothing() -> None:
    logprobs, _ = policy(0, 6, 1.0)
    same = torch.ones(6, dtype=torch.float64)
    assert torch.allclose(best_of_n_logprobs(logprobs, same, 64), logprobs, atol=1e-12)
    assert float(kl_divergence(logprobs, same, 64)) == pytest.approx(0, abs=1e-12)
    assert float(win_rate(logprobs, same, 64)) == pytest.approx(0.5)


def test_estimate_is_exact_for_one_atom_at_the_top_and_tends_to_the_bound() -> None:
    atom, many, n = 0.2, 20_000, 16  # the others as good as continuous
    logprobs = torch.cat([torch.full((many,), (1 - atom) / many, dtype=torch.float64), torch.tensor([atom], dtype=torch.float64)]).log()
    exact = float(kl_divergence(logprobs, torch.arange(many + 1).double(), n))
    assert float(kl_estimate(logprobs[-1:], n)) == pytest.approx(exact, abs=1e-6)
    ends = kl_estimate(torch.tensor([0.0, -30.0, -40.0, -1000.0], dtype=torch.float64), n)
    assert ends.tolist() == pytest.approx([0, kl_bound(n), kl_bound(n), kl_bound(n)], abs=1e-9)


def test_win_rate_is_n_over_n_plus_one_where_nothing_ties() -> None:
    same = torch.zeros(100_000, dtype=torch.float64)
    assert float(win_rate(same, torch.arange(100_000).double(), 4)) == pytest.approx(0.8, abs=1e-4)


def by_subsets(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Mean gold reward of the proxy's best over all subsets; ties share."""
    values = []
    for subset in itertools.combinations(range(len(proxy)), n):
        top = max(proxy[i] for i in subset)
        winners = [gold[i] for i in subset if proxy[i] == top]
        values.append(sum(winners) / len(winners))
    return sum(values) / len(values)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(-3, 3)), min_size=1, max_size=8), st.data())
@settings(max_examples=80, deadline=None)
def test_expected_gold_is_the_mean_over_all_subsets(samples: list[tuple[int, float]], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(samples)))
    proxy, gold = ([float(value) for value in column] for column in zip(*samples, strict=True))
    found = expected_gold(torch.tensor(proxy, dtype=torch.float64), torch.tensor(gold, dtype=torch.float64), n)
    assert float(found) == pytest.approx(by_subsets(proxy, gold, n), abs=1e-9)


def test_expected_gold_is_unbiased_for_the_exact_value() -> None:
    logprobs, proxy = policy(1, 6, 1.0)
    gold = torch.tensor([0.3, -1.0, 2.0, 0.5, -0.2, 1.1], dtype=torch.float64)
    exact = float((best_of_n_logprobs(logprobs, proxy, 4).exp() * gold).sum())
    draws = torch.multinomial(logprobs.exp(), 4000 * 12, replacement=True, generator=torch.manual_seed(0)).view(4000, 12)
    found = torch.stack([expected_gold(proxy[row], gold[row], 4) for row in draws])
    assert float(found.mean()) == pytest.approx(exact, abs=4 * float(found.std()) / math.sqrt(4000))


def test_impossible_numbers_are_refused() -> None:
    x = torch.zeros(3, dtype=torch.float64)
    with pytest.raises(ValueError, match="best of 4 cannot be estimated from 3"):
        expected_gold(x, x, 4)
    with pytest.raises(ValueError, match="not defined"):
        kl_bound(0)
