"""The clip acts on the signed product, and the textbook's numbers come out."""

from __future__ import annotations

import pytest
import torch

from trimtab.maths.policy_losses import importance_weighted, ppo_clip

# (advantage, ratio) -> (objective, derivative with respect to the ratio), clip 0.2
TABLE = [
    (1.0, 0.5, 0.5, 1.0),
    (1.0, 0.9, 0.9, 1.0),
    (1.0, 1.1, 1.1, 1.0),
    (1.0, 1.5, 1.2, 0.0),
    (1.0, 3.0, 1.2, 0.0),
    (-1.0, 0.5, -0.8, 0.0),
    (-1.0, 0.9, -0.9, -1.0),
    (-1.0, 1.1, -1.1, -1.0),
    (-1.0, 1.5, -1.5, -1.0),
    (-1.0, 3.0, -3.0, -1.0),
]


@pytest.mark.parametrize(("advantage", "ratio", "objective", "slope"), TABLE)
def test_clip_table(advantage: float, ratio: float, objective: float, slope: float) -> None:
    old = torch.tensor([-2.0], dtype=torch.float64)
    logprob = (old + torch.tensor([ratio], dtype=torch.float64).log()).requires_grad_()
    loss, clipped = ppo_clip(logprob, old, torch.tensor([advantage], dtype=torch.float64), 0.2)
    loss.sum().backward()
    assert -float(loss) == pytest.approx(objective, abs=1e-12)
    assert -float(logprob.grad) / ratio == pytest.approx(slope, abs=1e-12)  # d/d log rho = rho d/d rho
    assert bool(clipped) == (slope == 0)


def test_clipping_the_ratio_first_is_wrong_for_negative_advantages() -> None:
    ratio = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    right = -ppo_clip(ratio.log(), torch.zeros(3, dtype=torch.float64), -torch.ones(3, dtype=torch.float64), 0.2)[0]
    printed = torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * -1
    assert (right - printed).abs().tolist() == pytest.approx([0.3, 0.3, 1.8])


def test_at_the_sampling_policy_the_gradient_is_the_policy_gradient() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    actions, advantages = torch.tensor([0, 3, 6, 2, 2]), torch.randn(5, dtype=torch.float64, generator=torch.manual_seed(1))
    grads = []
    for surrogate in (lambda p: ppo_clip(p, p.detach(), advantages, 0.2)[0], lambda p: importance_weighted(p, p.detach(), advantages)):
        leaf = logits.clone().requires_grad_()
        logprobs = torch.log_softmax(leaf, -1).gather(1, actions[:, None])[:, 0]
        surrogate(logprobs).sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-15
