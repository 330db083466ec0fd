"""The penalty's parts add up to the whole, and the estimators estimate KL."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.maths.kl import adapted_beta, k1, k2, k3, kl_to_go_rewards, penalised_rewards, place_scores, straight_through


def test_the_textbooks_penalty() -> None:
    policy, reference = torch.tensor([-0.8, -0.4]), torch.tensor([-1.5, -2.1])
    assert float(k1(policy, reference).sum()) == pytest.approx(2.4)  # "Good day": more probable than under the reference


def test_k1_and_k3_are_unbiased_and_k2_is_close_nearby() -> None:
    p = torch.softmax(torch.randn(50, dtype=torch.float64, generator=torch.manual_seed(0)), -1)
    q = torch.softmax(p.log() + 0.1 * torch.randn(50, dtype=torch.float64, generator=torch.manual_seed(1)), -1)
    kl = float((p * (p / q).log()).sum())
    assert float((p * k1(p.log(), q.log())).sum()) == pytest.approx(kl, abs=1e-15)
    assert float((p * k3(p.log(), q.log())).sum()) == pytest.approx(kl, abs=1e-15)
    assert float((p * k2(p.log(), q.log())).sum()) == pytest.approx(kl, rel=0.1)


def test_token_rewards_sum_to_reward_minus_penalty() -> None:
    log_ratio = torch.tensor([0.3, -0.1, 0.2, 0.5, 0.0], dtype=torch.float64)
    rewards = penalised_rewards(torch.tensor([2.0, -1.0], dtype=torch.float64), log_ratio, torch.tensor([2, 4]), beta=0.1)
    assert rewards.tolist() == pytest.approx([-0.03, 0.01, 2 - 0.02, -0.05, -1.0])
    assert float(rewards[:3].sum()) == pytest.approx(2 - 0.1 * 0.4)


@given(st.floats(1e-4, 10), st.floats(0, 100), st.floats(0.1, 50))
def test_adaptive_beta_moves_towards_its_target_and_not_far(beta: float, kl: float, target: float) -> None:
    new = adapted_beta(beta, kl, target, responses=64, horizon=10_000)
    assert (new - beta) * (kl - target) >= 0
    assert abs(new / beta - 1) <= 0.2 * 64 / 10_000 + 1e-12


def column(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


@given(st.floats(-5, 0), st.floats(-5, 0))
@settings(max_examples=60, deadline=None)
def test_values_and_gradients_of_the_estimators(policy: float, reference: float) -> None:
    ratio = policy - reference
    expected = {
        k1: (ratio, 1.0),
        k2: (ratio**2 / 2, ratio),
        k3: (math.exp(-ratio) - 1 + ratio, 1 - math.exp(-ratio)),
    }
    for estimate, (value, slope) in expected.items():
        logprob = column(policy).requires_grad_()
        found = estimate(logprob, column(reference))
        assert found.item() == pytest.approx(value, abs=1e-9)
        assert float(torch.autograd.grad(found.sum(), logprob)[0]) == pytest.approx(slope, abs=1e-9)
    assert float(k3(column(policy), column(reference))) >= -1e-15


@given(st.floats(-5, 0), st.floats(-5, 0))
@settings(max_examples=30, deadline=None)
def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other(policy: float, reference: float) -> None:
    logprob = column(policy).requires_grad_()
    for estimate in (k1, k3):
        found = straight_through(estimate(logprob, column(reference)), k2(logprob, column(reference)))
        assert found.item() == pytest.approx(estimate(logprob, column(reference)).item(), abs=1e-9)
        assert float(torch.autograd.grad(found.sum(), logprob)[0]) == pytest.approx(policy - reference, abs=1e-9)


rows_of_kl = st.lists(st.lists(st.floats(0, 3), min_size=1, max_size=5), min_size=1, max_size=4)


@given(rows_of_kl, st.floats(0.01, 2))
@settings(max_examples=50, deadline=None)
def test_to_go_a_token_gets_the_kl_of_every_later_prefix_of_its_response(rows: list[list[float]], beta: float) -> None:
    full = column(*(x for row in rows for x in row)).requires_grad_()
    last = torch.tensor([len(row) for row in rows]).cumsum(0) - 1
    rewards = kl_to_go_rewards(full, last, beta)
    assert not rewards.requires_grad
    start = 0
    for row in rows:
        mine = rewards[start : start + len(row)]
        to_go = mine.flip(0).cumsum(0).flip(0)
        assert to_go.tolist() == pytest.approx([-beta * sum(row[t + 1 :]) for t in range(len(row))], abs=1e-9)
        start += len(row)


@given(rows_of_kl, st.floats(0.01, 2), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_rewards_stand_at_the_end_and_the_penalty_gives_no_gradient(rows: list[list[float]], beta: float, seed: int) -> None:
    penalty = column(*(x for row in rows for x in row)).requires_grad_()
    lengths = [len(row) for row in rows]
    last = torch.tensor(lengths).cumsum(0) - 1
    scores = torch.randn(len(rows), dtype=torch.float64, generator=torch.manual_seed(seed)).requires_grad_()
    placed = place_scores(scores, last, penalty)
    assert placed[last].tolist() == scores.tolist()
    assert int((placed != 0).sum()) <= len(rows)
    total = penalised_rewards(scores, penalty, last, beta)
    sums = [part.sum().item() for part in total.split(lengths)]
    assert sums == pytest.approx([s.item() - beta * sum(row) for s, row in zip(scores, rows, strict=True)], abs=1e-9)
    by_score, by_penalty = torch.autograd.grad(total.sum(), (scores, penalty), allow_unused=True)
    assert by_score.tolist() == [1.0] * len(rows)
    assert by_penalty is None
