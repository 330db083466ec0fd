"""Credit assignment: from per-token rewards and values to advantages and returns.

Rows are responses, columns are time; what lies behind a response's end is zero in every input, which is also the right value
there: the episode is over. Names follow the state before a token: v_t = V(x, y_<t).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
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


def n_step(
    rewards: Float[Tensor, "responses time"], values: Float[Tensor, "responses time"], discount: float, steps: int
) -> Float[Tensor, "responses time"]:
    """A_t = sum_{k < n} discount^k r_{t+k} + discount^n v_{t+n} - v_t: n = 1 is the TD error (Mnih et al. 2016, algorithm S3).

    v behind a response's end is 0, so an n of at least its length gives the return minus v_t.
    """
    horizon = min(steps, rewards.shape[1])
    target = torch.nn.functional.pad(values, (0, horizon))[:, horizon:] * discount**horizon
    padded = torch.nn.functional.pad(rewards, (0, horizon))
    for k in range(horizon):
        target = target + discount**k * padded[:, k : k + rewards.shape[1]]
    return target - values


def rewards_to_go(rewards: Float[Tensor, "responses time"], discount: float) -> Float[Tensor, "responses time"]:
    """G_t = sum_{k >= t} discount^(k - t) r_k."""
    return gae(rewards, torch.zeros_like(rewards), discount, 1.0)


def group_mean(x: Float[Tensor, " responses"], group: Int[Tensor, " responses"]) -> Float[Tensor, " responses"]:
    """The mean over each response's group, given back to every response. group: the group's number, from 0."""
    size = torch.bincount(group)
    return (x.new_zeros(len(size)).index_add(0, group, x) / size)[group]


def leave_one_out(x: Float[Tensor, " responses"], group: Int[Tensor, " responses"]) -> Float[Tensor, " responses"]:
    """The mean over the *other* responses of the group: a baseline that does not depend on the response itself (Kool et al. 2019).

    x - leave_one_out(x) = G / (G - 1) (x - group_mean(x)). A response alone in its group has the baseline 0.
    """
    size = torch.bincount(group)[group]
    return torch.where(size > 1, (group_mean(x, group) * size - x) / (size - 1).clamp(min=1), torch.zeros_like(x))


def group_deviation(x: Float[Tensor, " responses"], group: Int[Tensor, " responses"]) -> Float[Tensor, " responses"]:
    """The unbiased standard deviation (G - 1) within each response's group; 0 for a group of one."""
    size = torch.bincount(group)[group]
    square = group_mean((x - group_mean(x, group)).square(), group) * size / (size - 1).clamp(min=1)
    return square.sqrt()


def moments(x: Float[Tensor, " n"], mask: Bool[Tensor, " n"] | None = None, epsilon: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Mean and sqrt(var + epsilon) with the biased variance, over the entries of `mask`."""
    kept = x if mask is None else x[mask]
    return kept.mean(), (kept.var(correction=0) + epsilon).sqrt()


def whiten(
    x: Float[Tensor, " n"], mask: Bool[Tensor, " n"] | None = None, *, shift_mean: bool = True, epsilon: float = 1e-8
) -> Float[Tensor, " n"]:
    """(x - mean) / sqrt(var + epsilon) with the biased variance, over the entries of `mask`; others become 0.

    shift_mean=False keeps the mean: only the scale is changed. Source: Ziegler et al. 2019's code; Huang et al. 2023, detail 9.
    """
    mean, spread = moments(x, mask, epsilon)
    white = (x - mean) / spread if shift_mean else (x - mean) / spread + mean
    return white if mask is None else white * mask


def explained_variance(values: Float[Tensor, " n"], returns: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 no better than a constant. NaN-free."""
    variance = returns.var(correction=0)
    return torch.where(variance > 0, 1 - (returns - values).var(correction=0) / variance.clamp(min=1e-12), torch.zeros_like(variance))
