"""Regression of the critic on returns, per token."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def squared_error(values: Float[Tensor, " tokens"], returns: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """(V - R)^2 / 2, the return taken as a constant (semi-gradient)."""
    return 0.5 * (values - returns.detach()).square()


def clipped_squared_error(
    values: Float[Tensor, " tokens"], values_old: Float[Tensor, " tokens"], returns: Float[Tensor, " tokens"], clip: float
) -> Float[Tensor, " tokens"]:
    """max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2.

    No gradient once V has moved more than `clip` towards R since the rollout. Source: PPO's reference code; Huang et al. 2023.
    """
    near = values_old + (values - values_old).clamp(-clip, clip)
    return torch.maximum(squared_error(values, returns), squared_error(near, returns))
