"""What losses are made of: log-probabilities and entropies of a head, full KL, the adaptive coefficient, the penalty for length."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import SEEDS, close, generator, normal
from peer import Peer

from trimtab.maths.full_kl import full_kl
from trimtab.maths.kl import adapted_beta
from trimtab.maths.logprobs import Head, token_logprobs
from trimtab.models.reference import MovingReference
from trimtab.rewards.shaping import RewardShaping, ShapingConfig

pytestmark = pytest.mark.differential


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("temperature", "softcap", "scale", "bias"), [(1.0, None, 1.0, False), (0.7, 3.0, 1.0, True), (1.3, None, 0.25, True)]
)
def test_head_agrees(trl_1_16: Peer, seed: int, temperature: float, softcap: float | None, scale: float, bias: bool) -> None:
    """Log-probabilities, entropies and gradients by hidden states, weight and bias. TRL's kernel works in float32, hence 5e-6."""
    g = generator(seed)
    exact = {"hidden": normal(g, 9, 8), "weight": normal(g, 40, 8), "weights": normal(g, 2, 9)} | ({"bias": normal(g, 40)} if bias else {})
    given = {name: x.float() for name, x in exact.items()} | {"targets": torch.randint(40, (9,), generator=g)}
    leaves = {name: given[name].double().requires_grad_() for name in exact}
    wrt = [name for name in exact if name != "weights"]
    theirs = trl_1_16("fused_head", given, wrt=wrt, temperature=temperature, softcap=softcap, scale=scale)
    head = Head(leaves["weight"], leaves.get("bias"), scale, softcap)
    logprobs, entropy = token_logprobs(leaves["hidden"], head, given["targets"], temperature=temperature, entropy=True)
    assert entropy is not None
    (torch.stack([logprobs, entropy]) * leaves["weights"]).sum().backward()
    close(logprobs, theirs["logprobs"], 5e-6)
    close(entropy, theirs["entropy"], 5e-6)
    for name in wrt:
        gradient = leaves[name].grad
        assert gradient is not None
        close(gradient, theirs[f"grad.{name}"], 5e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_full_kl_agrees(trl_0_11: Peer, seed: int) -> None:
    """TRL's kl_penalty="full" is KL(pi || pi_ref) over the vocabulary."""
    g = generator(seed)
    hidden, hidden_ref, weight = normal(g, 9, 8), normal(g, 9, 8), normal(g, 40, 8)
    logprobs, logprobs_ref = (torch.log_softmax(h @ weight.t(), dim=-1) for h in (hidden, hidden_ref))
    theirs = trl_0_11("full_kl", {"logprobs": logprobs, "logprobs_ref": logprobs_ref})["kl"]
    close(full_kl(hidden, Head(weight), hidden_ref, Head(weight)), theirs)


def test_adaptive_coefficient_agrees(trl_0_11: Peer) -> None:
    """Fifty steps, with KLs far below, near and far above the target."""
    measured = 12 * torch.rand(50, generator=generator(0), dtype=torch.float64)
    theirs = trl_0_11("adaptive_kl", {"kl": measured}, target=6.0, horizon=1000, steps=64)["coefficients"]
    beta, ours = 0.2, []
    for kl in measured.tolist():
        beta = adapted_beta(beta, kl, 6.0, 64, 1000)
        ours.append(beta)
    close(torch.tensor(ours, dtype=torch.float64), theirs)


@pytest.mark.parametrize(("longest", "cache"), [(20, 5), (20, 1), (20, 20)])
def test_penalty_for_length_agrees(trl_1_16: Peer, longest: int, cache: int) -> None:
    """DAPO's soft overlong punishment, at every length around its two corners."""
    lengths = torch.arange(1, longest + 4)
    theirs = trl_1_16("overlong", {"lengths": lengths}, longest=longest, cache=cache)["rewards"]
    shape = RewardShaping(ShapingConfig(overlong=cache), max_tokens=longest)
    close(shape(torch.zeros(len(lengths), dtype=torch.float64), lengths, torch.zeros(len(lengths), dtype=torch.bool)), theirs)


@pytest.mark.parametrize("decay", [0.0, 0.6, 0.99])
def test_moving_reference_agrees(trl_1_16: Peer, decay: float) -> None:
    """TR-DPO's update; TRL's mixture weight is the policy's, ours (decay) the reference's."""
    g = generator(0)
    start, now = normal(g, 5, 4), normal(g, 5, 4)
    weight = torch.nn.Parameter(start.clone())
    policy: Any = SimpleNamespace(trainable=lambda: {"weight": weight})
    reference = MovingReference(policy)
    weight.data = now
    reference.move(decay)
    close(reference.weights["weight"], trl_1_16("synced", {"policy": now, "reference": start}, alpha=1 - decay)["reference"])
