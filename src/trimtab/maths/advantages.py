"""Credit assignment: from per-token rewards and values to advantages and returns.

Rows are responses, columns are time; what lies behind a response's end is zero in every input, which is also the right value
there: the episode is over. Names follow the state before a token: v_t = V(x, y_<t).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def gae(
    rewards: Float[Tensor, "responses time"], values: Float[Tensor, "responses time"], discount: float, lambda_: float
) -> Float[Tensor, "responses time"]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 11-16):

        delta_t = r_t + discount v_{t+1} - v_t,      A_t = sum_l (discount lambda)^l delta_{t+l}

    lambda = 0 is the TD error; lambda = 1 is the discounted return minus v_t. v after the last token is 0.
    """
    v_tp1 = torch.nn.functional.pad(values[:, 1:], (0, 1))
    deltas = rewards + discount * v_tp1 - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in range(deltas.shape[1] - 1, -1, -1):
        running = deltas[:, t] + discount * lambda_ * running
        advantages[:, t] = running
    return advantages


def rewards_to_go(rewards: Float[Tensor, "responses time"], discount: float) -> Float[Tensor, "responses time"]:
    """G_t = sum_{k >= t} discount^(k - t) r_k."""
    return gae(rewards, torch.zeros_like(rewards), discount, 1.0)


def whiten(
    x: Float[Tensor, " n"], mask: Bool[Tensor, " n"] | None = None, *, shift_mean: bool = True, epsilon: float = 1e-8
) -> Float[Tensor, " n"]:
    """(x - mean) / sqrt(var + epsilon) with the biased variance, over the entries of `mask`; others become 0.

    shift_mean=False keeps the mean: only the scale is changed. Source: Ziegler et al. 2019's code; Huang et al. 2023, detail 9.
    """
    kept = x if mask is None else x[mask]
    mean = kept.mean()
    white = (x - mean) * torch.rsqrt(kept.var(correction=0) + epsilon)
    if not shift_mean:
        white = white + mean
    return white if mask is None else white * mask


def explained_variance(values: Float[Tensor, " n"], returns: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant. NaN-free."""
    variance = returns.var(correction=0)
    return torch.where(variance > 0, 1 - (returns - values).var(correction=0) / variance.clamp(min=1e-12), torch.zeros_like(variance))
