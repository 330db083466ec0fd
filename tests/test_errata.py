"""Formulas that texts and pages print wrongly: the printed form fails by a number, and ours gives the right one.

Equation numbers are those of "Foundations of Large Language Models", chapters on alignment.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.algorithms import PREFERENCES
from trimtab.algorithms.base import KLConfig, KLPenalty
from trimtab.algorithms.reinforce import REINFORCE
from trimtab.batch import Batch, Outputs
from trimtab.maths import best_of_n, preference_losses
from trimtab.maths.kl import adapted_beta
from trimtab.maths.optimum import kl_divergence, log_partition, objective, optimal_logprobs
from trimtab.maths.policy_losses import importance_weighted, ppo_clip
from trimtab.maths.reward_losses import centring, list_sum, pointwise
from trimtab.types import Group, Prompt, Response

WORDS = 6
SPACE = Batch((Group(Prompt((1,), ""), tuple(Response((word,), "") for word in range(WORDS))),))
"""All responses of one token."""


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def drawn(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(WORDS, dtype=torch.float64, generator=torch.manual_seed(seed))


def descended(loss: Callable[[Tensor], Tensor], start: Tensor, steps: int, rate: float) -> Tensor:
    """Plain gradient descent."""
    at = start.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(at), at)
        at = (at - rate * gradient).detach().requires_grad_()
    return at.detach()


def slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    at = at.clone().requires_grad_()
    return torch.autograd.grad(loss(at), at)[0]


# (10.50): Clip(rho) A with Clip(rho) = min(rho, bound(rho)); right is the minimum of the two products.


@pytest.mark.parametrize(("ratio", "printed_slope", "right_slope"), [(0.5, -1.0, 0.0), (1.5, 0.0, -1.0), (3.0, 0.0, -1.0)])
def test_clip_of_the_ratio_alone_blocks_the_correction_of_a_bad_token(ratio: float, printed_slope: float, right_slope: float) -> None:
    rho, bad = column(ratio), column(-1.0)
    printed = slope(lambda r: (torch.minimum(r, r.clamp(0.8, 1.2)) * bad).sum(), rho)
    ours = slope(lambda r: -ppo_clip(r.log(), column(0.0), bad, 0.2)[0].sum(), rho)
    assert (float(printed), float(ours)) == pytest.approx((printed_slope, right_slope), abs=1e-12)


# Figure 10.9: beta (log pi - log pi_old) as a term of the loss, with y ~ pi_old.


def penalty_loss(settings: dict[str, Any], sampler: Tensor | None, reference: Tensor) -> Callable[[Tensor], Tensor]:
    """The expected loss of the penalty alone; samples come from the sampler, or from the policy itself."""

    def loss(logits: Tensor) -> Tensor:
        logprobs = torch.log_softmax(logits, 0)
        old = logprobs.detach() if sampler is None else sampler
        batch = SPACE.with_tokens(logprobs_old=old, logprobs_ref=reference).with_responses(reward=torch.zeros_like(old))
        algorithm = REINFORCE(REINFORCE.Config(kl=KLConfig(beta=1.0, **settings), baseline="none"))
        batch = algorithm.credit(batch)
        terms = algorithm.surrogate(logprobs, batch)[0] + algorithm.penalty.loss(Outputs(logprobs=logprobs), batch)
        return (old.exp() * terms).sum()

    return loss


def test_the_printed_penalty_drives_the_policy_away_and_ours_draws_it_back() -> None:
    old = torch.log_softmax(drawn(0, 0.3), 0)
    start = old + drawn(1, 0.12)

    def distance(logits: Tensor) -> float:
        return float(kl_divergence(torch.log_softmax(logits, 0), old))

    printed = penalty_loss({"place": "loss", "estimator": "k1"}, old, old)
    in_reward = penalty_loss({"place": "reward", "estimator": "k1"}, None, old)
    weighted = penalty_loss({"place": "loss", "estimator": "k2", "ratio_weighted": True}, old, old)
    assert 0.0005 < distance(start) < 0.002
    assert distance(descended(printed, start, 20, 0.5)) > 10 * distance(start)
    assert distance(descended(printed, start, 200, 0.5)) > 1
    for right in (in_reward, weighted):
        assert distance(descended(right, start, 20, 0.5)) < distance(start) / 5
        assert distance(descended(right, start, 400, 0.5)) < 1e-10
    assert float(slope(printed, old).abs().max()) < 1e-15  # at pi_old it is nothing at all


# (10.48): E_ref[grad Pr R], without the denominator.


def test_the_update_at_the_reference_point_needs_its_denominator() -> None:
    reference, rewards = drawn(2), drawn(3)
    old = torch.log_softmax(reference, 0)
    right = slope(lambda z: (torch.softmax(z, 0) * rewards).sum(), reference)
    ours = slope(lambda z: -(old.exp() * importance_weighted(torch.log_softmax(z, 0), old, rewards)).sum(), reference)
    printed = slope(lambda z: (old.exp() * torch.softmax(z, 0) * rewards).sum(), reference)
    assert float((ours - right).norm() / right.norm()) < 1e-12
    assert float((printed - right).norm() / right.norm()) > 0.5
    assert float((printed * right).sum() / (printed.norm() * right.norm())) < 0.99  # not a matter of scale


# (10.57): a sum over both orders of every pair.


def test_both_orders_of_a_list_pull_its_best_down() -> None:
    def both_orders(scores: Tensor) -> Tensor:
        difference = scores[:, None] - scores[None, :]
        off = ~torch.eye(len(scores), dtype=torch.bool)
        return -torch.nn.functional.logsigmoid(difference[off]).sum()

    scores = column(2.0, 1.0, 0.0)
    assert float(slope(both_orders, scores)[0]) > 0.5  # descent lowers the best
    assert float(slope(lambda s: list_sum(s).sum(), scores)[0]) < -0.1  # ours raises it
    flat = descended(both_orders, scores, 300, 0.2)
    assert float(flat.max() - flat.min()) < 1e-6
    ours = descended(lambda s: list_sum(s).sum(), scores, 300, 0.2)
    assert float(ours[0] - ours[1]) > 2
    assert float(ours[1] - ours[2]) > 2


# (10.62), (10.70): -E[(rating - r)^2]; (10.63): -E[(r_a + r_b)^2].


def test_squares_are_added_not_subtracted() -> None:
    ratings, scores = column(1.0, -0.5), column(0.2, 0.3)
    ours = descended(lambda r: pointwise(r, ratings).sum(), scores, 50, 0.1)
    assert torch.allclose(ours, ratings, atol=1e-4)
    printed = descended(lambda r: -pointwise(r, ratings).sum(), scores, 50, 0.1)
    assert float((printed - ratings).abs().min()) > 1000


def test_the_regulariser_draws_sums_to_zero() -> None:
    pair = column(0.4, 0.2)
    ours = descended(lambda r: centring(r[:1], r[1:]).sum(), pair, 50, 0.1)
    assert float(ours.sum()) == pytest.approx(0, abs=1e-6)
    assert float(ours[0] - ours[1]) == pytest.approx(0.2)
    assert float(descended(lambda r: -centring(r[:1], r[1:]).sum(), pair, 50, 0.1).sum()) > 1000


# (10.74): log pi_ref exp(r / beta), where log[pi_ref exp(r / beta)] is meant.


def test_the_logarithm_is_of_the_whole_product() -> None:
    rewards, reference, beta = drawn(4), torch.log_softmax(drawn(5), 0), 0.5
    policy = torch.log_softmax(drawn(6), 0)
    value = objective(policy, rewards, reference, beta)
    right = beta * (policy.exp() * (reference + rewards / beta - policy)).sum()
    printed = beta * (policy.exp() * (reference * torch.exp(rewards / beta) - policy)).sum()
    assert float(right) == pytest.approx(float(value), abs=1e-12)
    assert abs(float(printed - value)) > 1
    best = optimal_logprobs(rewards, reference, beta)
    assert torch.allclose(best, reference + rewards / beta - log_partition(rewards, reference, beta), atol=1e-12)
    other = torch.log_softmax(reference * torch.exp(rewards / beta), 0)
    assert objective(other, rewards, reference, beta) < objective(best, rewards, reference, beta) - 0.1


# "KL of best-of-n = log n - (n - 1) / n": an upper bound, exact only where no two responses are equally good.


def test_the_formula_for_best_of_n_is_a_bound() -> None:
    same, rewards = torch.zeros(10, dtype=torch.float64), torch.arange(10).double()
    exact = float(best_of_n.kl_divergence(same, rewards, 64))
    assert exact == pytest.approx(2.2935, abs=5e-5)
    assert best_of_n.kl_bound(64) == pytest.approx(math.log(64) - 63 / 64) == pytest.approx(3.1745, abs=5e-5)
    many = torch.zeros(4096, dtype=torch.float64)
    assert float(best_of_n.kl_divergence(many, torch.arange(4096).double(), 4)) == pytest.approx(best_of_n.kl_bound(4), abs=1e-4)


# bco_pair, printed with DPO's loss; ipo, on means instead of sums.


def test_bco_pair_is_not_dpo() -> None:
    chosen, rejected, beta = column(1.5), column(1.0), 0.3
    ours = float(preference_losses.bco_pair(chosen, rejected, beta))
    assert ours == pytest.approx(math.log1p(math.exp(-beta * 1.5)) + math.log1p(math.exp(beta * 1.0)))
    assert abs(ours - float(preference_losses.dpo(chosen, rejected, beta))) > 0.1
    shifted = float(preference_losses.bco_pair(chosen + 5, rejected + 5, beta))
    assert abs(shifted - ours) > 0.1  # it sees where a pair lies; DPO sees the difference alone


def test_ipo_has_its_target_on_sums_over_tokens() -> None:
    tau, long, short = 0.1, 20, 4
    chosen, rejected = column(3.0), column(3.0 - 1 / (2 * tau))
    assert float(preference_losses.ipo(chosen, rejected, tau)) == pytest.approx(0, abs=1e-12)
    assert float(preference_losses.ipo(chosen / long, rejected / short, tau)) > 10
    assert PREFERENCES["ipo"].load().Config().log_ratio == "sum"
    assert PREFERENCES["ipo_mean"].load().Config().log_ratio == "mean"


# non_score_reward = beta * kl; the adaptive coefficient.


def test_the_penalty_in_the_reward_is_negative_where_the_policy_prefers_more_than_the_reference() -> None:
    old, reference = column(*[-0.8] * WORDS), column(*[-1.5] * WORDS)
    batch = SPACE.with_tokens(logprobs_old=old, logprobs_ref=reference)
    assert KLPenalty(KLConfig(beta=0.2)).rewards(batch).tolist() == pytest.approx([-0.2 * 0.7] * WORDS)


def test_the_coefficient_rises_when_kl_is_above_its_target() -> None:
    assert adapted_beta(0.1, 12.0, 6.0, 512, 10_000) == pytest.approx(0.1 * (1 + 0.2 * 512 / 10_000))
    assert adapted_beta(0.1, 6.3, 6.0, 512, 10_000) == pytest.approx(0.1 * (1 + 0.05 * 512 / 10_000))
    assert adapted_beta(0.1, 1.0, 6.0, 512, 10_000) == pytest.approx(0.1 * (1 - 0.2 * 512 / 10_000))


# Questions of the course.


def test_the_reward_is_not_maximised_above_all_within_one_rollout() -> None:
    """However long one batch is learnt from, the clip leaves the taken response little more probable; without it the ratio runs off."""
    start, advantages = drawn(7), column(2.0, -1.0, 0.5, -0.5, 0.0, -1.0)
    old = torch.log_softmax(start, 0)

    def clipped(z: Tensor) -> Tensor:
        return (old.exp() * ppo_clip(torch.log_softmax(z, 0), old, advantages, 0.2)[0]).sum()

    def free(z: Tensor) -> Tensor:
        return (old.exp() * importance_weighted(torch.log_softmax(z, 0), old, advantages)).sum()

    def ratio(z: Tensor) -> float:
        return float((torch.log_softmax(z, 0) - old)[0].exp())

    held, run_off = (ratio(descended(loss, start, 500, 0.5)) for loss in (clipped, free))
    assert 1.15 < held < 1.35
    assert run_off > 2 * held


def test_where_policy_and_reference_agree_the_reward_is_one_constant() -> None:
    rewards, reference, beta = column(*[0.7] * WORDS), torch.log_softmax(drawn(8), 0), 0.5
    assert torch.allclose(optimal_logprobs(rewards, reference, beta), reference, atol=1e-12)
    assert beta * float(log_partition(rewards, reference, beta)) == pytest.approx(0.7)
