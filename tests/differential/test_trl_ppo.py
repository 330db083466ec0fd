"""PPO against TRL 0.11.4 (the last version with its losses as functions) and 1.12.0 (the last with PPO at all)."""

from __future__ import annotations

import math

import pytest
import torch
from cases import SEEDS, close, counts, normal, rollout, rows
from peer import Peer

from trimtab.algorithms.ppo import PPO
from trimtab.batch import Batch, Outputs
from trimtab.maths.advantages import whiten
from trimtab.maths.kl import k1, k2
from trimtab.maths.reductions import to_column

pytestmark = pytest.mark.differential


def biased_to_unbiased(batch: Batch) -> float:
    """TRL whitens with the variance that divides by N - 1, we by N: theirs = ours * sqrt((N - 1) / N)."""
    n = int(batch.mask.sum())
    return math.sqrt((n - 1) / n)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening_differs_from_1_12_by_bessels_correction_only(trl_1_12: Peer, seed: int, shift_mean: bool) -> None:
    """TRL: unbiased variance. Ours: biased, as in Ziegler et al.'s code. TRL also whitens masked entries, we zero them."""
    batch = rollout(seed, holes=True)
    x, mask = batch.tokens["advantages"], batch.mask
    theirs = trl_1_12("masked_whiten", {"x": x, "mask": mask.double()}, shift_mean=shift_mean)["white"]
    ours = whiten(x, mask, shift_mean=shift_mean, epsilon=0.0)
    mean = 0.0 if shift_mean else float(x[mask].mean())
    exact = (ours[mask] - mean) * biased_to_unbiased(batch) + mean
    close(exact, theirs[mask])
    assert torch.equal(ours[~mask], torch.zeros_like(ours[~mask]))


@pytest.mark.parametrize("seed", SEEDS)
def test_token_rewards_agree(trl_0_11: Peer, seed: int) -> None:
    """r_t = -beta k1 + 1[t = T] r, the score at the last response token."""
    batch = rollout(seed)
    beta = 0.07
    algorithm = PPO(PPO.Config(kl={"beta": beta}))
    tensors = rows(batch, "logprobs_old", "logprobs_ref")
    given = {"scores": batch.responses["reward"], "logprobs": tensors["logprobs_old"], "logprobs_ref": tensors["logprobs_ref"]}
    theirs = trl_0_11("compute_rewards", {**given, "mask": tensors["mask"]}, kl_coefficient=beta)["rewards"]
    close(algorithm.rewards(batch), to_column(theirs, batch.lengths))


@pytest.mark.parametrize(("estimator", "name"), [(k1, "kl"), (k2, "mse")])
def test_kl_estimators_agree(trl_0_11: Peer, estimator: object, name: str) -> None:
    """TRL calls k1 "kl" and k2 "mse"."""
    batch = rollout(0)
    tensors = rows(batch, "logprobs", "logprobs_ref")
    given = {"scores": batch.responses["reward"], **tensors}
    theirs = trl_0_11("compute_rewards", given, kl_coefficient=1.0, kl_penalty=name)["kl"]
    close(estimator(batch.tokens["logprobs"], batch.tokens["logprobs_ref"]), to_column(theirs, batch.lengths))  # type: ignore[operator]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("gamma", "lambda_"), [(1.0, 0.95), (0.97, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_and_returns_agree(trl_0_11: Peer, seed: int, gamma: float, lambda_: float) -> None:
    """GAE and returns are equal; whitened advantages differ by Bessel's correction only."""
    batch = rollout(seed)
    algorithm = PPO(PPO.Config(kl={"beta": 0.05}, discount=gamma, gae_lambda=lambda_))
    credited = algorithm.credit(batch)
    padded = rows(credited, "token_rewards", "values_old")
    given = {"values": padded["values_old"], "rewards": padded["token_rewards"], "mask": padded["mask"]}
    theirs = trl_0_11("compute_advantages", given, gamma=gamma, lam=lambda_, whiten_rewards=False)
    close(credited.tokens["returns"], to_column(theirs["returns"], batch.lengths))
    close(credited.tokens["advantages"] * biased_to_unbiased(batch), to_column(theirs["advantages"], batch.lengths))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clip", [0.1, 0.2, 0.4])
@pytest.mark.parametrize("holes", [False, True])
def test_losses_and_their_gradients_agree(trl_0_11: Peer, seed: int, clip: float, holes: bool) -> None:
    """The policy loss, the value loss (TRL's vf_coef is 1 here) and the gradients of both."""
    batch = rollout(seed, holes=holes)
    algorithm = PPO(PPO.Config(clip=clip, value_clip=clip))
    names = ("logprobs", "logprobs_old", "values", "values_old", "advantages", "returns")
    theirs = trl_0_11("loss", rows(batch, *names), wrt=("logprobs", "values"), cliprange=clip, cliprange_value=clip, ratio_threshold=1e9)
    logprobs, values = (batch.tokens[name].clone().requires_grad_() for name in ("logprobs", "values"))
    outputs = Outputs(logprobs=logprobs, values=values)
    policy, value = (loss(outputs, batch, counts(batch)) for loss in (algorithm.policy_loss, algorithm.value_loss))
    (policy.value + value.value).backward()
    close(policy.value, theirs["policy"])
    close(value.value, theirs["value"])
    assert logprobs.grad is not None
    assert values.grad is not None
    close(logprobs.grad, to_column(theirs["grad.logprobs"], batch.lengths))
    close(values.grad, to_column(theirs["grad.values"], batch.lengths))
    close(policy.means["clip_fraction"], theirs["clip_fraction"])
    assert 0 < theirs["clip_fraction"] < 1  # both sides of the clip were seen


def test_ratio_threshold_is_theirs_alone(trl_0_11: Peer) -> None:
    """TRL drops a batch whose mean ratio exceeds `ratio_threshold` (10 by default); we have target_kl instead, and report ratio_max."""
    batch = rollout(0)
    batch = batch.with_tokens(logprobs=batch.tokens["logprobs_old"] + 3.0)
    names = ("logprobs", "logprobs_old", "values", "values_old", "advantages", "returns")
    theirs = trl_0_11("loss", rows(batch, *names))
    ours = PPO(PPO.Config()).policy_loss(Outputs(logprobs=batch.tokens["logprobs"]), batch, counts(batch))
    assert theirs["policy"] == 0
    assert ours.value != 0
    assert float(ours.maxima["ratio_max"]) == pytest.approx(math.exp(3.0))


def test_masked_mean_is_the_token_aggregation(trl_1_12: Peer) -> None:
    from trimtab.maths.reductions import aggregate

    batch = rollout(1, holes=True)
    x = normal(torch.Generator().manual_seed(3), len(batch.mask))
    theirs = trl_1_12("masked_mean", {"x": x, "mask": batch.mask.double()})["loss"]
    n = counts(batch)
    close(aggregate(x, batch.mask, batch.response_of_token, "token", tokens=n.tokens, responses=n.responses), theirs)
