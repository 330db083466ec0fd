"""The classes that the preference stage runs, with their preparation and averaging, against TRL's whole loss methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import SEEDS, close, counts, rollout, rows
from peer import Peer
from torch import Tensor

from trimtab.algorithms import PREFERENCES
from trimtab.batch import Batch, Outputs

pytestmark = pytest.mark.differential

PAIRS = 6


def made(name: str, **settings: Any) -> Any:
    kind = PREFERENCES[name].load()
    return kind(kind.Config(**settings), name)


def pairs(seed: int, *, holes: bool = True) -> Batch:
    """Six prompts with a better response and a worse one each, labelled 1 and 0."""
    batch = rollout(seed, groups=PAIRS, size=2, holes=holes)
    judgement = torch.tensor([1.0, 0.0] * PAIRS, dtype=torch.float64)
    return batch.with_tokens(logprobs_now=batch.tokens["logprobs"]).with_responses(judgement=judgement, desirable=judgement)


def chosen_first(x: Tensor) -> Tensor:
    """TRL's order of rows: all chosen ones, then all rejected ones."""
    return torch.cat([x[0::2], x[1::2]])


def back(x: Tensor) -> Tensor:
    return torch.stack(list(x.chunk(2)), dim=1).flatten(0, 1)


def ask(trl: Peer, function: str, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    given = {name: chosen_first(x) for name, x in rows(batch, "logprobs", "logprobs_ref").items()}
    return trl(function, given, wrt=["logprobs"], **settings)


def ours(loss: Any, batch: Batch, mismatched: Batch | None = None) -> tuple[Tensor, Tensor]:
    """Our loss of a minibatch and its gradient by every token's log-probability."""
    leaf = batch.tokens["logprobs"].clone().requires_grad_()
    value = loss.loss(Outputs(logprobs=leaf), loss.prepare(batch, mismatched), counts(batch)).value
    value.backward()
    assert leaf.grad is not None
    return value, leaf.grad


def agree(loss: Any, batch: Batch, theirs: dict[str, Tensor], mismatched: Batch | None = None) -> None:
    value, gradient = ours(loss, batch, mismatched)
    close(value, theirs["loss"])
    expected = back(theirs["grad.logprobs"])
    close(gradient, torch.cat([row[:n] for row, n in zip(expected, batch.lengths, strict=True)]))


BETA = {"beta": 0.3}
SAME: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("dpo", BETA, {"loss_type": ["sigmoid"], **BETA}),
    "hinge": ("hinge", BETA, {"loss_type": ["hinge"], **BETA}),
    "ipo": ("ipo_mean", {"tau": 0.3}, {"loss_type": ["ipo"], **BETA}),
    "sigmoid_norm": ("dpo_mean", BETA, {"loss_type": ["sigmoid_norm"], **BETA}),
    "exo_pair": ("exo", {**BETA, "label_smoothing": 0.1}, {"loss_type": ["exo_pair"], "label_smoothing": 0.1, **BETA}),
    "nca_pair": ("nca", BETA, {"loss_type": ["nca_pair"], **BETA}),
    "robust": ("robust", {**BETA, "label_smoothing": 0.2}, {"loss_type": ["robust"], "label_smoothing": 0.2, **BETA}),
    "bco_pair": ("bco_pair", BETA, {"loss_type": ["bco_pair"], **BETA}),
    "sppo_hard": ("sppo", BETA, {"loss_type": ["sppo_hard"], **BETA}),
    "aot": ("aot", {**BETA, "label_smoothing": 0.1}, {"loss_type": ["aot"], "label_smoothing": 0.1, **BETA}),
    "aot_unpaired": ("aot_unpaired", {**BETA, "label_smoothing": 0.1}, {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1, **BETA}),
    "apo_zero": ("apo_zero", BETA, {"loss_type": ["apo_zero"], **BETA}),
    "apo_down": ("apo_down", BETA, {"loss_type": ["apo_down"], **BETA}),
    "discopop": ("discopop", BETA, {"loss_type": ["discopop"], **BETA}),
    "forward_kl": ("f_dpo", {**BETA, "divergence": "forward_kl"}, {"f_divergence_type": "forward_kl", **BETA}),
    "js_divergence": ("f_dpo", {**BETA, "divergence": "jensen_shannon"}, {"f_divergence_type": "js_divergence", **BETA}),
    "use_weighting": ("wpo", BETA, {"use_weighting": True, **BETA}),
    "ld_alpha": ("ld_dpo", {**BETA, "tail_weight": 0.4}, {"ld_alpha": 0.4, **BETA}),
    "several": (
        "mixture",
        {"members": {"dpo": 0.8, "bco_pair": 0.2, "hinge": 0.5}, "settings": dict.fromkeys(("dpo", "bco_pair", "hinge"), BETA)},
        {"loss_type": ["sigmoid", "bco_pair", "hinge"], "loss_weights": [0.8, 0.2, 0.5], **BETA},
    ),
}
"""TRL's name, our loss and settings, TRL's settings. TRL's ipo is our ipo_mean: h per token. use_weighting: TRL's alignment
of weights, log sum_v p_v^2, is given as 0 (see test_trl_preference)."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", SAME)
def test_same_loss_same_gradient(trl_1_16: Peer, seed: int, name: str) -> None:
    kind, settings, theirs = SAME[name]
    batch = pairs(seed)
    agree(made(kind, **settings), batch, ask(trl_1_16, "dpo", batch, **theirs))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drift", [-0.2, 0.2])
def test_kto_agrees_with_its_estimate_of_z(trl_1_16: Peer, seed: int, drift: float) -> None:
    """Both: z = max(0, mean log-ratio of responses to other prompts), over the whole minibatch, without gradient."""
    batch = pairs(seed)
    other = rollout(seed + 10, groups=2 * PAIRS, size=1)
    other = other.with_tokens(logprobs_now=other.tokens["logprobs_ref"] + drift)
    given = {name: chosen_first(x) for name, x in rows(batch, "logprobs", "logprobs_ref").items()}
    kl = rows(other, "logprobs_now", "logprobs_ref")
    given |= {"label": chosen_first(batch.responses["desirable"]).long()}
    given |= {"kl_logprobs": kl["logprobs_now"], "kl_logprobs_ref": kl["logprobs_ref"]}
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    theirs = trl_1_16("kto", given, wrt=["logprobs"], **weights, **BETA)
    agree(made("kto", **weights, **BETA), batch, theirs, other)
    assert (theirs["kl"] > 0) == (drift > 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_bco_agrees_over_three_steps(trl_1_12: Peer, seed: int) -> None:
    """The running mean of rewards moves before the loss is taken, on both sides."""
    loss, batches = made("bco", **BETA), [pairs(seed + step) for step in range(3)]
    given: dict[str, Tensor] = {}
    for name, column in (("", "logprobs"), ("_ref", "logprobs_ref")):
        sums = torch.stack([chosen_first(b.sum_by_response(b.tokens[column] * b.mask)) for b in batches])
        given |= {f"{side}{name}": half.contiguous() for side, half in zip(("chosen", "rejected"), sums.chunk(2, dim=1), strict=True)}
    for batch in batches[:-1]:
        loss.prepare(batch)
    value, gradient = ours(loss, batches[-1])
    theirs = trl_1_12("bco", given, wrt=["chosen", "rejected"], **BETA)
    close(value, theirs["loss"])
    by_response = back(torch.cat([theirs["grad.chosen"][-1], theirs["grad.rejected"][-1]]))
    close(gradient, by_response[batches[-1].response_of_token] * batches[-1].mask)


def likelihood(trl: Peer, function: str, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    """TRL's loss with a likelihood; every prompt has one predicted token of log-probability -0.7."""
    given = {name: chosen_first(x) for name, x in rows(batch, "logprobs").items()}
    given["logprobs"] = torch.where(given["mask"].bool(), given["logprobs"], -1.0)  # padding, read by nobody
    given["prompt_logprobs"] = torch.full((2 * PAIRS, 1), -0.7, dtype=torch.float64)
    answer = trl(function, given, wrt=["logprobs"], **settings)
    assert not answer["grad.logprobs"][~given["mask"].bool()].any()
    return answer


def negative(seed: int) -> Batch:
    """Pairs whose log-probabilities are negative, as a normalised model's are."""
    batch = pairs(seed, holes=False)
    return batch.with_tokens(logprobs=-batch.tokens["logprobs"].abs() - 0.01)


def chosen_tokens(batch: Batch) -> int:
    return sum(batch.lengths[0::2])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo_agrees_up_to_the_weight_of_its_likelihood(trl_1_16: Peer, seed: int, smoothing: float) -> None:
    """TRL's likelihood is a mean over all chosen tokens of the batch; ours (and the paper's) is a mean over responses of their sums.

    So our nll_weight is cpo_alpha times pairs / chosen tokens.
    """
    batch = negative(seed)
    theirs = likelihood(trl_1_16, "cpo_with_likelihood", batch, loss_type="sigmoid", label_smoothing=smoothing, cpo_alpha=0.8, **BETA)
    weight = 0.8 * PAIRS / chosen_tokens(batch)
    agree(made("cpo", label_smoothing=smoothing, nll_weight=weight, **BETA), batch, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_simpo_agrees(trl_1_16: Peer, seed: int) -> None:
    batch = negative(seed)
    theirs = likelihood(trl_1_16, "cpo_with_likelihood", batch, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.7, beta=2.5)
    agree(made("simpo", beta=2.5, gamma=0.7), batch, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_orpo_agrees_up_to_its_likelihood_which_trl_extends_to_the_prompt(trl_1_16: Peer, seed: int) -> None:
    """TRL's likelihood is a mean over prompt and response tokens of the whole batch, ours over responses of sums of their own tokens.

    With n prompt tokens and m response tokens: theirs = prompt part / (n + m) + ours with nll_weight = pairs / (n + m).
    The odds ratio itself is the same; TRL computes it in float32.
    """
    batch = negative(seed)
    theirs = likelihood(trl_1_16, "orpo_with_likelihood", batch, beta=0.2)
    tokens = PAIRS + chosen_tokens(batch)
    theirs["loss"] -= 0.7 * PAIRS / tokens
    agree(made("orpo", weight=0.2, nll_weight=PAIRS / tokens, nll_per_token=False), batch, theirs)


@pytest.mark.parametrize("seed", SEEDS)
def test_rpo_agrees_up_to_the_weight_of_its_likelihood(trl_1_16: Peer, seed: int) -> None:
    """TRL's loss_type "sft" is a mean over all chosen tokens of the batch, as CPO's."""
    batch = pairs(seed)
    theirs = ask(trl_1_16, "dpo", batch, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.4], **BETA)
    tokens = batch.sum_by_response(batch.mask.double())[0::2].sum().item()
    agree(made("rpo", nll_weight=0.4 * PAIRS / tokens, **BETA), batch, theirs)
