"""Preference losses against TRL 1.16.0 (DPO, KTO, CPO, ORPO trainers) and 1.12.0 (BCO)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import SEEDS, close, generator, normal, rollout, rows
from peer import Peer
from torch import Tensor

from trimtab.batch import Batch
from trimtab.maths import preference_losses as losses

pytestmark = pytest.mark.differential

PAIRS = 6


def pairs(seed: int) -> Batch:
    """Twelve responses, chosen ones first, with tokens that are not the assistant's own."""
    return rollout(seed, groups=2, size=PAIRS, holes=True)


def ratios(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The log-probabilities as a leaf, and h = log pi - log pi_ref of chosen and rejected responses."""
    leaf = batch.tokens["logprobs"].clone().requires_grad_()
    h = batch.sum_by_response((leaf - batch.tokens["logprobs_ref"]) * batch.mask)
    return leaf, h[:PAIRS], h[PAIRS:]


def agree(batch: Batch, leaf: Tensor, ours: Tensor, theirs: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    """Value and gradient by every token's log-probability."""
    ours.backward()
    assert leaf.grad is not None
    close(ours, theirs["loss"], tolerance)
    close(leaf.grad, torch.cat([row[:n] for row, n in zip(theirs["grad.logprobs"], batch.lengths, strict=True)]), tolerance)


def agree_on(leaves: dict[str, Tensor], ours: Tensor, theirs: dict[str, Tensor]) -> None:
    """Value and gradient by each of the leaves."""
    ours.backward()
    close(ours, theirs["loss"])
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        close(leaf.grad, theirs[f"grad.{name}"])


def dpo(trl: Peer, batch: Batch, **settings: Any) -> dict[str, Tensor]:
    return trl("dpo", rows(batch, "logprobs", "logprobs_ref"), wrt=["logprobs"], **settings)


Terms = Callable[[Tensor, Tensor, float], Tensor]
SAME: dict[str, tuple[dict[str, Any], Terms]] = {
    "sigmoid": ({}, losses.dpo),
    "hinge": ({}, losses.hinge),
    "robust": ({"label_smoothing": 0.2}, lambda c, r, beta: losses.robust_dpo(c, r, beta, 0.2)),
    "exo_pair": ({"label_smoothing": 0.1}, lambda c, r, beta: losses.exo_pair(c, r, beta, 0.1)),
    "nca_pair": ({}, losses.nca_pair),
    "bco_pair": ({}, losses.bco_pair),
    "sppo_hard": ({}, losses.sppo_hard),
    "apo_zero": ({}, losses.apo_zero),
    "apo_down": ({}, losses.apo_down),
    "discopop": ({"discopop_tau": 0.07}, lambda c, r, beta: losses.discopop(c, r, beta, 0.07)),
    "aot_unpaired": ({"label_smoothing": 0.1}, lambda c, r, beta: losses.aot(c, r, beta, 0.1)),
}
"""TRL's loss_type, its settings, and our function: equal without further ado."""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize("name", SAME)
def test_same_loss_same_gradient(trl_1_16: Peer, seed: int, beta: float, name: str) -> None:
    settings, terms = SAME[name]
    batch = pairs(seed)
    leaf, chosen, rejected = ratios(batch)
    # EXO's smoothing is a float32 tensor in TRL: log(0.1) is off by 1e-8
    agree(batch, leaf, terms(chosen, rejected, beta).mean(), dpo(trl_1_16, batch, loss_type=[name], beta=beta, **settings))


@pytest.mark.parametrize("seed", SEEDS)
def test_paired_aot_agrees(trl_1_16: Peer, seed: int) -> None:
    """Sorted log pi_w / pi_l against sorted log pi_ref,w / pi_ref,l."""
    batch = pairs(seed)
    leaf = batch.tokens["logprobs"].clone().requires_grad_()
    own = batch.sum_by_response(leaf * batch.mask)
    reference = batch.sum_by_response(batch.tokens["logprobs_ref"] * batch.mask)
    ours = losses.aot(own[:PAIRS] - own[PAIRS:], reference[:PAIRS] - reference[PAIRS:], 0.5, 0.1).mean()
    agree(batch, leaf, ours, dpo(trl_1_16, batch, loss_type=["aot"], beta=0.5, label_smoothing=0.1))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "function"), [("ipo", losses.ipo), ("sigmoid_norm", losses.dpo)])
def test_length_normalised_losses_are_ours_of_h_per_token(trl_1_16: Peer, seed: int, name: str, function: Terms) -> None:
    """TRL's `ipo` divides each log-ratio by the response's length; the paper's equation 17, and ours, take sums.

    TRL's authors write that IPO's authors confirmed the normalised form. It is the same function of h / |y|.
    """
    batch = pairs(seed)
    leaf, chosen, rejected = ratios(batch)
    lengths = batch.sum_by_response(batch.mask.double())
    ours = function(chosen / lengths[:PAIRS], rejected / lengths[PAIRS:], 0.3).mean()
    theirs = dpo(trl_1_16, batch, loss_type=[name], beta=0.3)
    agree(batch, leaf, ours, theirs)
    assert abs(function(chosen, rejected, 0.3).mean().item() - theirs["loss"].item()) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("theirs", "ours"), [("reverse_kl", "reverse_kl"), ("forward_kl", "forward_kl"), ("js_divergence", "jensen_shannon")]
)
def test_f_dpo_agrees(trl_1_16: Peer, seed: int, theirs: str, ours: losses.Divergence) -> None:
    """TRL keeps additive constants of f', which cancel in the difference."""
    batch = pairs(seed)
    leaf, chosen, rejected = ratios(batch)
    value = losses.f_dpo(chosen, rejected, 0.3, ours).mean()
    agree(batch, leaf, value, dpo(trl_1_16, batch, loss_type=["sigmoid"], beta=0.3, f_divergence_type=theirs))


@pytest.mark.parametrize("alpha", [0.3, 0.5, 0.9])
def test_alpha_divergence_agrees_with_one_minus_alpha(trl_1_16: Peer, alpha: float) -> None:
    """TRL: f'(u) = (u^(a - 1) - 1) / (a - 1); ours: (1 - u^-alpha) / alpha. So a = 1 - alpha. TRL has it in float32 only."""
    batch = pairs(0)
    batch = batch.with_tokens(**{name: batch.tokens[name].float() for name in ("logprobs", "logprobs_ref")})
    theirs = dpo(trl_1_16, batch, loss_type=["sigmoid"], beta=0.3, f_divergence_type="alpha_divergence", f_alpha_divergence_coef=1 - alpha)
    batch = batch.with_tokens(**{name: batch.tokens[name].double() for name in ("logprobs", "logprobs_ref")})
    leaf, chosen, rejected = ratios(batch)
    agree(batch, leaf, losses.f_dpo(chosen, rejected, 0.3, "alpha", alpha).mean(), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("aligned", [False, True])
def test_wpo_weights_agree_up_to_their_alignment(trl_1_16: Peer, seed: int, aligned: bool) -> None:
    """TRL subtracts log sum_v p_v^2 from every token's log-probability (the paper's alignment for sampled responses).

    Ours is WPO without it. Given the same adjusted log-probabilities, ours is theirs; with that sum at 1, it is so as it stands.
    """
    batch = pairs(seed)
    g = generator(seed)
    adjustment = -normal(g, len(batch.mask)).abs() if aligned else torch.zeros(len(batch.mask), dtype=torch.float64)
    given = rows(batch.with_tokens(log_sum_sq_probs=adjustment), "logprobs", "logprobs_ref", "log_sum_sq_probs")
    theirs = trl_1_16("dpo", given, wrt=["logprobs"], loss_type=["sigmoid"], beta=0.3, use_weighting=True)
    leaf, chosen, rejected = ratios(batch)
    mean = batch.sum_by_response((leaf - adjustment) * batch.mask) / batch.sum_by_response(batch.mask.double())
    weights = losses.wpo_weights(mean[:PAIRS], mean[PAIRS:])
    agree(batch, leaf, (weights * losses.dpo(chosen, rejected, 0.3)).mean(), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_length_desensitised_dpo_agrees(trl_1_16: Peer, seed: int, alpha: float) -> None:
    """LD-DPO: log-probabilities beyond the pair's shorter length count alpha."""
    batch = pairs(seed)
    own = torch.cat([flags.cumsum(0) - 1 for flags in batch.mask.long().split(batch.lengths)])
    lengths = batch.sum_by_response(batch.mask.double()).long()
    public = torch.minimum(lengths[:PAIRS], lengths[PAIRS:]).repeat(2)[batch.response_of_token]
    weights = losses.desensitised_weights(own, public, alpha)
    leaf = batch.tokens["logprobs"].clone().requires_grad_()
    h = batch.sum_by_response((leaf - batch.tokens["logprobs_ref"]) * weights * batch.mask)
    theirs = dpo(trl_1_16, batch, loss_type=["sigmoid"], beta=0.3, ld_alpha=alpha)
    agree(batch, leaf, losses.dpo(h[:PAIRS], h[PAIRS:], 0.3).mean(), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("drift", [-0.2, 0.2])
def test_kto_agrees_given_its_reference_point(trl_1_16: Peer, seed: int, drift: float) -> None:
    """z = max(0, mean log-ratio of mismatched responses); a negative drift makes it 0. Weights of both sides included."""
    batch = pairs(seed)
    g = generator(seed)
    label = torch.rand(2 * PAIRS, generator=g) < 0.5
    mismatched = -normal(g, 2 * PAIRS, 5).abs()
    kl = {"kl_logprobs": mismatched + drift, "kl_logprobs_ref": mismatched}
    given = {**rows(batch, "logprobs", "logprobs_ref"), **kl, "label": label.long()}
    theirs = trl_1_16("kto", given, wrt=["logprobs"], beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    leaf, chosen, rejected = ratios(batch)
    z = torch.full((2 * PAIRS,), max(0.0, 5 * drift), dtype=torch.float64)
    agree(batch, leaf, losses.kto(torch.cat([chosen, rejected]), label, z, 0.3, 1.3, 0.7).mean(), theirs)
    assert float(theirs["kl"]) == pytest.approx(float(z[0]))


@pytest.mark.parametrize("seed", SEEDS)
def test_unpaired_apo_zero_is_kto_with_z_at_zero(trl_1_16: Peer, seed: int) -> None:
    batch = pairs(seed)
    label = torch.arange(2 * PAIRS) % 3 == 0
    given = {**rows(batch, "logprobs", "logprobs_ref"), "label": label.long()}
    theirs = trl_1_16("kto", given, wrt=["logprobs"], beta=0.3, loss_type="apo_zero_unpaired")
    leaf, chosen, rejected = ratios(batch)
    zero = torch.zeros(2 * PAIRS, dtype=torch.float64)
    agree(batch, leaf, losses.kto(torch.cat([chosen, rejected]), label, zero, 0.3).mean(), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_bco_agrees_given_its_running_mean(trl_1_12: Peer, seed: int, steps: int) -> None:
    """delta is the running mean of all rewards so far; TRL keeps it in float32, hence agreement to 1e-6 and not better."""
    g = generator(seed)
    names = ("chosen", "rejected", "chosen_ref", "rejected_ref")
    given = {name: normal(g, steps, PAIRS, scale=3.0).requires_grad_() for name in names}
    theirs = trl_1_12("bco", given, wrt=names[:2], beta=0.3)
    h = torch.cat([given["chosen"] - given["chosen_ref"], given["rejected"] - given["rejected_ref"]], dim=1)
    delta = (0.3 * h.detach()).mean().expand(2 * PAIRS)
    ours = losses.bco(h[-1], torch.arange(2 * PAIRS) < PAIRS, delta, 0.3).mean()
    agree_on({name: given[name] for name in names[:2]}, ours, theirs)


def test_label_smoothing_of_sigmoid_is_ours_alone(trl_1_16: Peer) -> None:
    """TRL 1.16.0's `sigmoid` ignores `label_smoothing` (its `robust`, `exo_pair` and `aot` read it): its loss is ours without it."""
    batch = pairs(0)
    theirs = dpo(trl_1_16, batch, loss_type=["sigmoid"], beta=0.5, label_smoothing=0.2)
    leaf, chosen, rejected = ratios(batch)
    agree(batch, leaf, losses.dpo(chosen, rejected, 0.5).mean(), theirs)
    assert abs(losses.dpo(chosen, rejected, 0.5, 0.2).mean().item() - theirs["loss"].item()) > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_conservative_dpo_agrees_with_cpos_sigmoid(trl_1_16: Peer, seed: int, smoothing: float) -> None:
    """TRL keeps the conservative form in CPO's `sigmoid`, which reads log-probabilities: with log-ratios it is cDPO."""
    g = generator(seed)
    chosen, rejected = (normal(g, PAIRS, scale=3.0).requires_grad_() for _ in range(2))
    given = {"chosen": chosen, "rejected": rejected}
    theirs = trl_1_16("cpo", given, wrt=list(given), loss_type="sigmoid", beta=0.5, label_smoothing=smoothing)
    agree_on(given, losses.dpo(chosen, rejected, 0.5, smoothing).mean(), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("gamma", [0.0, 1.4])
def test_simpo_agrees(trl_1_16: Peer, seed: int, gamma: float) -> None:
    """On mean log-probabilities per token; TRL's margin is gamma too (it divides by beta and multiplies again)."""
    g = generator(seed)
    given = {name: -normal(g, PAIRS).abs() for name in ("chosen", "rejected")}
    theirs = trl_1_16("cpo", given, wrt=list(given), loss_type="simpo", beta=2.5, simpo_gamma=gamma)
    for leaf in given.values():
        leaf.requires_grad_()
    agree_on(given, losses.simpo(given["chosen"], given["rejected"], 2.5, gamma).mean(), theirs)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_odds_ratio_agrees(trl_1_16: Peer, seed: int, weight: float) -> None:
    """ORPO's second term, weighted. TRL computes it in float32."""
    g = generator(seed)
    given = {name: (-normal(g, PAIRS).abs() - 0.05).requires_grad_() for name in ("chosen", "rejected")}
    theirs = trl_1_16("orpo", given, wrt=list(given), beta=weight)
    agree_on(given, weight * losses.odds_ratio(given["chosen"], given["rejected"]).mean(), theirs)
