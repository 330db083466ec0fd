"""Group algorithms against TRL 1.16.0: GRPO in all its loss types, GSPO, GMPO, RLOO; their advantages; engine correction."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import SEEDS, close, counts, generator, normal, rollout, rows
from peer import Peer
from torch import Tensor

from trimtab.algorithms import ALGORITHMS
from trimtab.batch import Batch, Outputs
from trimtab.maths.reductions import to_column

pytestmark = pytest.mark.differential

NO_KL = {"kl": {"beta": 0.0}}
COLUMNS = ("logprobs", "logprobs_old", "logprobs_ref", "entropy")


def algorithm(name: str, **settings: Any) -> Any:
    kind = ALGORITHMS[name].load()
    return kind(kind.Config(**{**NO_KL, **settings}))


def case(seed: int) -> Batch:
    """Three groups of four, with tokens that are not the assistant's own, and one advantage per response."""
    batch = rollout(seed, holes=True)
    per_response = normal(generator(seed), len(batch.lengths))
    return batch.with_tokens(advantages=per_response[batch.response_of_token]).with_responses(advantage=per_response)


def ask(trl: Peer, function: str, batch: Batch, columns: tuple[str, ...] = COLUMNS[:3], **settings: Any) -> dict[str, Tensor]:
    given = {**rows(batch, *columns), "advantages": batch.responses["advantage"]}
    return trl(function, given, wrt=[name for name in columns if name in ("logprobs", "entropy")], **settings)


def ours(made: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss of a minibatch, and its gradients by log-probabilities and entropies."""
    leaves = {name: batch.tokens[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
    value = made.policy_loss(Outputs(**leaves), batch, counts(batch)).value
    value.backward()
    return value, {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}


def agree(made: Any, batch: Batch, theirs: dict[str, Tensor]) -> None:
    value, gradients = ours(made, batch)
    close(value, theirs["loss"])
    close(gradients["logprobs"], to_column(theirs["grad.logprobs"], batch.lengths))


SEQUENCE = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.08}
GSPO = {"clip": 0.05, "clip_high": 0.08}
TAU = {"sapo_temperature_pos": 0.9, "sapo_temperature_neg": 1.2}
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", {"clip": 0.2}, {"loss_type": "grpo", "epsilon": 0.2}),
    "grpo, unequal clip": ("grpo", {"clip": 0.1, "clip_high": 0.3}, {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.3}),
    "grpo, dual clip": ("grpo", {"clip": 0.1, "dual_clip": 1.3}, {"loss_type": "grpo", "epsilon": 0.1, "delta": 1.3}),
    "bnpo": ("grpo", {"clip": 0.2, "aggregation": "token"}, {"loss_type": "bnpo", "epsilon": 0.2}),
    "dapo": ("dapo", {}, {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
    "dr_grpo": ("dr_grpo", {"length": 17}, {"loss_type": "dr_grpo", "epsilon": 0.2, "max_completion_length": 17}),
    "cispo": ("cispo", {"clip_high": 0.2}, {"loss_type": "cispo", "epsilon_high": 1.2}),
    "sapo": ("sapo", {"tau_positive": 0.9, "tau_negative": 1.2}, {"loss_type": "sapo", **TAU}),
    "gspo": ("gspo", GSPO, {"loss_type": "grpo", **SEQUENCE}),
    "luspo": ("gspo", {**GSPO, "aggregation": "fixed-length", "length": 1}, {"loss_type": "luspo", **SEQUENCE}),
}
"""TRL's loss_type, our algorithm, our settings, TRL's settings. CISPO's bound is 1 + clip_high for us and epsilon_high for TRL; TRL's
bnpo is our grpo with aggregation=token; luspo is gspo without the division by length."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SAME)
def test_same_loss_same_gradient(trl_1_16: Peer, seed: int, name: str) -> None:
    kind, settings, theirs = SAME[name]
    batch = case(seed)
    agree(algorithm(kind, **settings), batch, ask(trl_1_16, "grpo", batch, beta=0.0, **theirs))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("low", "high"), [(0.4, 0.4), (0.05, 0.1)])
def test_gmpo_agrees(trl_1_16: Peer, seed: int, low: float, high: float) -> None:
    batch = case(seed)
    agree(algorithm("gmpo", clip=low, clip_high=high), batch, ask(trl_1_16, "gmpo", batch, beta=0.0, epsilon=low, epsilon_high=high))


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "cispo", "sapo"])
@pytest.mark.parametrize("seed", SEEDS)
def test_k3_in_the_loss_agrees(trl_1_16: Peer, seed: int, name: str) -> None:
    """kl.place=loss, kl.estimator=k3 is TRL's penalty with use_bias_correction_kl=False (1.16.0 has it True)."""
    kind, settings, theirs = SAME[name]
    batch = case(seed)
    made = algorithm(kind, **settings, kl={"beta": 0.3, "place": "loss", "estimator": "k3"})
    agree(made, batch, ask(trl_1_16, "grpo", batch, beta=0.3, use_bias_correction_kl=False, **theirs))


@pytest.mark.parametrize("seed", SEEDS)
def test_ratio_weighted_k3_agrees(trl_1_16: Peer, seed: int) -> None:
    """TRL's bias correction (rho k3, as DeepSeek-V3.2) differentiates the ratio too, and so do we."""
    batch = case(seed)
    made = algorithm("dapo", kl={"beta": 0.3, "place": "loss", "estimator": "k3", "ratio_weighted": True})
    agree(made, batch, ask(trl_1_16, "grpo", batch, beta=0.3, use_bias_correction_kl=True, **SAME["dapo"][2]))


@pytest.mark.parametrize("name", ["dapo", "cispo", "bnpo"])
def test_entropy_bonus_agrees_where_tokens_weigh_the_same(trl_1_16: Peer, name: str) -> None:
    kind, settings, theirs = SAME[name]
    batch = case(0)
    answer = ask(trl_1_16, "grpo", batch, COLUMNS, beta=0.0, entropy_coef=0.1, **theirs)
    value, gradients = ours(algorithm(kind, **settings, entropy_weight=0.1), batch)
    close(value, answer["loss"])
    for column, gradient in gradients.items():
        close(gradient, to_column(answer[f"grad.{column}"], batch.lengths))


def test_entropy_bonus_follows_the_aggregation_for_us_only(trl_1_16: Peer) -> None:
    """TRL always takes the mean over tokens; ours is averaged like the policy term, here per response first."""
    batch = case(0)
    answer = ask(trl_1_16, "grpo", batch, COLUMNS, beta=0.0, entropy_coef=0.1, **SAME["grpo"][2])
    value, _ = ours(algorithm("grpo"), batch)
    entropy, mask = batch.tokens["entropy"], batch.mask
    close(value - 0.1 * entropy[mask].mean(), answer["loss"])
    mean = batch.sum_by_response(entropy * mask) / batch.sum_by_response(mask.double())
    close(ours(algorithm("grpo", entropy_weight=0.1), batch)[0], value - 0.1 * mean.mean())


@pytest.mark.parametrize("name", ["dapo", "cispo", "grpo", "sapo", "dr_grpo"])
def test_micro_batches_change_nothing_on_either_side(trl_1_16: Peer, name: str) -> None:
    """Equal numbers of responses in three micro-batches: TRL's sum under gradient accumulation is our loss of the whole minibatch."""
    kind, settings, theirs = SAME[name]
    batch = case(1)
    agree(algorithm(kind, **settings), batch, ask(trl_1_16, "grpo", batch, micro_batches=3, beta=0.0, **theirs))


def test_bnpo_depends_on_micro_batches(trl_1_16: Peer) -> None:
    """TRL's bnpo divides by the tokens of the micro-batch: with three of them it is another objective than ours, which counts globally."""
    kind, settings, theirs = SAME["bnpo"]
    batch = case(1)
    whole, cut = (ask(trl_1_16, "grpo", batch, micro_batches=n, beta=0.0, **theirs)["loss"] for n in (1, 3))
    close(ours(algorithm(kind, **settings), batch)[0], whole)
    assert abs(whole - cut) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_grpo_advantages_agree(trl_1_16: Peer, seed: int) -> None:
    """(r - mean) / (sd + 1e-4) with the unbiased sd of the group, both sides."""
    batch = rollout(seed)
    theirs = trl_1_16("grpo_scored", {"rewards": batch.responses["reward"][:, None]}, num_generations=4, beta=0.0)
    close(algorithm("grpo").credit(batch).tokens["advantages"][batch.last_token], theirs["advantages"])


def test_groups_that_score_alike_teach_nothing_on_either_side(trl_1_16: Peer) -> None:
    batch = rollout(0).with_responses(reward=torch.full((12,), 0.7, dtype=torch.float64))
    theirs = trl_1_16("grpo_scored", {"rewards": batch.responses["reward"][:, None]}, num_generations=4, beta=0.0)
    close(algorithm("grpo").credit(batch).tokens["advantages"][batch.last_token], theirs["advantages"])
    close(theirs["advantages"], torch.zeros(12))


@pytest.mark.parametrize("seed", SEEDS)
def test_dr_grpo_advantages_agree(trl_1_16: Peer, seed: int) -> None:
    """TRL leaves the division by sd to `scale_rewards`, which its loss_type "dr_grpo" does not switch off; ours does."""
    batch = rollout(seed)
    given = {"rewards": batch.responses["reward"][:, None]}
    theirs = trl_1_16("grpo_scored", given, num_generations=4, beta=0.0, loss_type="dr_grpo", scale_rewards="none")
    made = algorithm("dr_grpo").credit(batch).tokens["advantages"][batch.last_token]
    close(made, theirs["advantages"])
    default = trl_1_16("grpo_scored", given, num_generations=4, beta=0.0, loss_type="dr_grpo")
    assert (made - default["advantages"]).abs().max() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_masking_of_truncated_responses_agrees(trl_1_16: Peer, seed: int) -> None:
    """They count in the group's mean and deviation, and have no token in the loss; both divide by all responses."""
    batch = rollout(seed)
    present = rows(batch)["present"]
    given = {"rewards": batch.responses["reward"][:, None], "present": present, "truncated": batch.truncated.long()}
    theirs = trl_1_16("grpo_scored", given, num_generations=4, beta=0.0, mask_truncated_completions=True)
    credited = algorithm("grpo", mask_truncated=True).credit(batch)
    assert 0 < batch.truncated.sum() < len(batch.lengths)
    close(credited.tokens["advantages"][batch.last_token], theirs["advantages"])
    assert torch.equal(rows(credited)["mask"], theirs["completion_mask"].long())
    loss = ask(trl_1_16, "grpo", credited.with_responses(advantage=theirs["advantages"]), beta=0.0, **SAME["grpo"][2])
    agree(algorithm("grpo"), credited, loss)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_engine_correction_agrees(trl_1_16: Peer, seed: int, level: str, kind: str) -> None:
    """TIS and MIS: pi_old / pi_sampler, as TRL makes it for vLLM, and the loss it weighs. TRL's lower bound of "truncate" is set to 0."""
    batch = rollout(seed)
    low, high = (0.0, 1.2) if kind == "truncate" else (0.6, 1.2)
    sampled = rows(batch, "logprobs_old", "logprobs_sampler")
    correction = {
        "vllm_importance_sampling_mode": f"{level}_{kind}", "vllm_importance_sampling_clip_min": low,
        "vllm_importance_sampling_clip_max": high,
    }  # fmt: skip
    scored = trl_1_16("grpo_scored", {"rewards": batch.responses["reward"][:, None], **sampled}, num_generations=4, beta=0.0, **correction)
    made = algorithm("grpo", mismatch={"kind": kind, "level": level, "low": low, "high": high})
    credited = made.credit(batch)
    given = {
        **rows(batch, "logprobs", "logprobs_old"), "advantages": scored["advantages"],
        "is_ratio": scored["importance_sampling_ratio"],
    }  # fmt: skip
    agree(made, credited, trl_1_16("grpo", given, wrt=["logprobs"], beta=0.0, use_vllm=True, **SAME["grpo"][2], **correction))
    ratio = scored["importance_sampling_ratio"]
    assert (ratio == (high if kind == "truncate" else 0.0)).any()  # the bound was met


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_rloo_advantages_agree(trl_1_16: Peer, seed: int, beta: float) -> None:
    """r - beta sum_t k1, minus the mean of the group's others."""
    batch = rollout(seed)
    given = {"rewards": batch.responses["reward"][:, None], **rows(batch, "logprobs_old", "logprobs_ref")}
    theirs = trl_1_16("rloo_scored", given, num_generations=4, beta=beta)
    close(algorithm("rloo", kl={"beta": beta}).credit(batch).tokens["advantages"][batch.last_token], theirs["advantages"])


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_has_the_same_gradient_at_the_sampling_policy(trl_1_16: Peer, seed: int) -> None:
    """There both are -A grad log pi(y | x) / B. TRL's value is -mean A (one ratio per response), ours -mean |y| A (one per token).

    It is the gradient of aggregation=fixed-length with length=1. Our default, aggregation=token, divides by tokens instead of
    responses: the same direction, scaled by B / N.
    """
    batch = case(seed)
    batch = batch.with_tokens(logprobs=batch.tokens["logprobs_old"])
    theirs = ask(trl_1_16, "rloo", batch, beta=0.0)
    gradient = to_column(theirs["grad.logprobs"], batch.lengths)
    n = counts(batch)
    summed, per_token = algorithm("rloo", aggregation="fixed-length", length=1), algorithm("rloo")
    value, gradients = ours(summed, batch)
    close(gradients["logprobs"], gradient)
    close(ours(per_token, batch)[1]["logprobs"] * (n.tokens / n.responses), gradient)
    close(theirs["loss"], -batch.responses["advantage"].mean())
    close(value, -(batch.responses["advantage"] * batch.sum_by_response(batch.mask.double())).mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_rloo_off_policy_clips_the_ratio_of_the_whole_response_in_trl_only(trl_1_16: Peer, seed: int) -> None:
    """TRL: PPO's clip on exp(sum_t log rho_t), by hand here. Ours has a ratio per token and no clip: other values once pi has moved."""
    batch = case(seed)
    theirs = ask(trl_1_16, "rloo", batch, beta=0.0, epsilon=0.2)
    ratio = batch.sum_by_response((batch.tokens["logprobs"] - batch.tokens["logprobs_old"]) * batch.mask).exp()
    advantage = batch.responses["advantage"]
    close(-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean(), theirs["loss"])
    assert not math.isclose(float(ours(algorithm("rloo"), batch)[0].detach()), float(theirs["loss"]), rel_tol=1e-3)
