"""The closed-form optimum, and the textbook's questions about it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.maths.kl import k1, penalised_rewards
from trimtab.maths.optimum import estimate_log_partition, implicit_rewards, kl_divergence, log_partition, objective, optimal_logprobs
from trimtab.maths.policy_losses import ppo_clip


def problem(seed: int, n: int = 121) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rewards, reference and some other policy over n responses."""
    generator = torch.manual_seed(seed)
    rewards, ref, other = (torch.randn(n, dtype=torch.float64, generator=generator) for _ in range(3))
    return rewards, torch.log_softmax(ref, 0), torch.log_softmax(2 * other, 0)


@given(st.integers(0, 1000), st.sampled_from([0.05, 0.1, 0.5, 1.0, 2.0]))
@settings(max_examples=40, deadline=None)
def test_the_gap_is_beta_times_kl_to_the_optimum_for_every_policy(seed: int, beta: float) -> None:
    rewards, ref, policy = problem(seed)
    best = optimal_logprobs(rewards, ref, beta)
    value = beta * log_partition(rewards, ref, beta)
    assert float(objective(best, rewards, ref, beta)) == pytest.approx(float(value), abs=1e-9)
    gap = value - objective(policy, rewards, ref, beta)
    assert float(gap) == pytest.approx(float(beta * kl_divergence(policy, best)), abs=1e-9)
    assert gap > 0


def test_no_reward_leaves_the_reference_and_z_one() -> None:
    _, ref, _ = problem(0)
    zero = torch.zeros_like(ref)
    assert torch.allclose(optimal_logprobs(zero, ref, 0.3), ref, atol=1e-12)
    assert float(log_partition(zero, ref, 0.3)) == pytest.approx(0, abs=1e-12)


def test_raising_one_reward_multiplies_its_odds_and_shrinks_all_others_alike() -> None:
    rewards, ref, _ = problem(1)
    raised = rewards.clone()
    raised[7] += 0.6
    before, after = optimal_logprobs(rewards, ref, 0.5), optimal_logprobs(raised, ref, 0.5)
    change = after - before
    others = torch.cat([change[:7], change[8:]])
    assert float(others.max() - others.min()) < 1e-12
    assert float(change[7] - others[0]) == pytest.approx(0.6 / 0.5)
    assert float(others[0]) < 0


def test_large_beta_keeps_the_reference_and_small_beta_takes_the_best() -> None:
    rewards, ref, _ = problem(2)
    assert float(kl_divergence(optimal_logprobs(rewards, ref, 1e6), ref)) < 1e-9
    assert int(optimal_logprobs(rewards, ref, 1e-4).argmax()) == int(rewards.argmax())
    assert float(optimal_logprobs(rewards, ref, 1e-4).max().exp()) > 1 - 1e-9


def test_implicit_reward_of_the_optimum_is_the_reward_up_to_a_constant() -> None:
    rewards, ref, policy = problem(3)
    shift = rewards - implicit_rewards(optimal_logprobs(rewards, ref, 0.4), ref, 0.4)
    assert torch.allclose(shift, (0.4 * log_partition(rewards, ref, 0.4)).expand_as(shift), atol=1e-12)
    lower = policy < ref
    assert (implicit_rewards(policy, ref, 0.4)[lower] < 0).all()


def test_partition_from_samples_is_the_exact_one_within_its_stated_error() -> None:
    rewards, ref, _ = problem(4)
    exact, generator = float(log_partition(rewards, ref, 0.7)), torch.Generator().manual_seed(0)
    scores = []
    for _ in range(300):
        drawn = torch.multinomial(ref.exp(), 400, replacement=True, generator=generator)
        found = estimate_log_partition(rewards[drawn].tolist(), 0.7)
        scores.append((found.log_z - exact) / found.error)
    z = torch.tensor(scores)
    assert abs(float(z.mean())) < 0.25  # log of a mean is a little low
    assert 0.85 < float(z.std()) < 1.15


def test_partition_of_a_constant_reward_is_exact_and_one_sample_is_refused() -> None:
    found = estimate_log_partition([1.5] * 10, 0.5)
    assert (found.log_z, found.error, found.effective) == pytest.approx((3.0, 0.0, 10.0))
    with pytest.raises(ValueError, match="no standard error"):
        estimate_log_partition([1.0], 0.5)


def test_segment_rewards_sum_to_the_response_reward() -> None:
    segments = torch.tensor([1.2, -0.5, 0.8, -0.2], dtype=torch.float64)
    placed = penalised_rewards(segments, torch.zeros(10, dtype=torch.float64), torch.tensor([2, 4, 7, 9]), beta=0.1)
    assert float(placed.sum()) == pytest.approx(1.3)


def test_a_long_response_the_reference_would_not_give_pays_more() -> None:
    short = k1(torch.tensor([-0.5]), torch.tensor([-0.6])).sum()  # "Yes."
    long = k1(torch.full((30,), -0.5), torch.full((30,), -12.0)).sum()
    assert long > short


def test_a_token_far_worse_than_expected_becomes_less_probable() -> None:
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    logprob = torch.log_softmax(logits, 0)[2:3]
    ppo_clip(logprob, logprob.detach(), torch.tensor([-4.0], dtype=torch.float64), 0.2)[0].sum().backward()
    assert logits.grad[2] > 0  # gradient descent lowers the logit of the token that was taken
    assert (torch.cat([logits.grad[:2], logits.grad[3:]]) < 0).all()
