"""Reward-model losses against TRL 1.16.0's RewardTrainer."""

from __future__ import annotations

import pytest
import torch
from cases import SEEDS, close, generator, normal
from peer import Peer

from trimtab.maths.reward_losses import bradley_terry, centring

pytestmark = pytest.mark.differential


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("weight", [None, 0.01, 1.0])
def test_bradley_terry_margin_and_centring_agree(trl_1_16: Peer, seed: int, margins: bool, weight: float | None) -> None:
    """-log sigma(r_c - r_r - m) + weight (r_c + r_r)^2, values and gradients."""
    g = generator(seed)
    scores = normal(g, 14, scale=3.0)
    margin = normal(g, 7).abs()
    tensors = {"scores": scores} | ({"margin": margin} if margins else {})
    theirs = trl_1_16("reward", tensors, wrt=["scores"], center_rewards_coefficient=weight)
    leaf = scores.clone().requires_grad_()
    chosen, rejected = leaf.chunk(2)
    ours = (bradley_terry(chosen, rejected, margin if margins else 0.0) + (weight or 0.0) * centring(chosen, rejected)).mean()
    ours.backward()
    close(ours, theirs["loss"])
    assert leaf.grad is not None
    close(leaf.grad, theirs["grad.scores"])
    assert torch.isfinite(theirs["loss"])
