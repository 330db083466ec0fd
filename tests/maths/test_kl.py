"""The penalty's parts add up to the whole, and the estimators estimate KL."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.maths.kl import adapted_beta, k1, k2, k3, penalised_rewards


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
