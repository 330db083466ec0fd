"""The exact reward-KL frontier of a task: no policy has more reward at the same KL."""

from __future__ import annotations

import math

from torch import Tensor

from trimtab.exact.task import Task
from trimtab.maths.optimum import kl_divergence, log_partition, optimal_logprobs


def frontier(task: Task, logprobs_ref: Tensor, points: int = 200) -> list[tuple[float, float]]:
    """(KL, E[r]) of the optimum pi*_beta for many beta, from near the reference to near the best response."""
    betas = [10 ** (1.5 - 3.2 * i / (points - 1)) for i in range(points)]
    return [_optimum(task, logprobs_ref, beta) for beta in betas]


def best_reward(task: Task, logprobs_ref: Tensor, kl: float) -> float:
    """The largest E[r] that any policy of this KL can have: min over beta of beta (KL + log Z(beta)).

    For every beta and policy E[r] - beta KL <= beta log Z(beta), so no policy lies above; the optimum of some beta touches it.
    """

    def bound(log_beta: float) -> float:
        beta = math.exp(log_beta)
        partitions = [log_partition(r, ref, beta) for r, ref in zip(task.reward_table, logprobs_ref, strict=True)]
        return beta * (kl + float(sum(partitions)) / len(partitions))

    low, high = math.log(1e-4), math.log(1e4)
    golden = (math.sqrt(5) - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    value_a, value_b = bound(a), bound(b)
    for _ in range(80):  # the bound is convex in beta, so it has one valley
        if value_a < value_b:
            high, b, value_b = b, a, value_a
            a = high - golden * (high - low)
            value_a = bound(a)
        else:
            low, a, value_a = a, b, value_b
            b = low + golden * (high - low)
            value_b = bound(b)
    return min(value_a, value_b)


def _optimum(task: Task, logprobs_ref: Tensor, beta: float) -> tuple[float, float]:
    kl = reward = 0.0
    for r, ref in zip(task.reward_table, logprobs_ref, strict=True):
        best = optimal_logprobs(r, ref, beta)
        kl += float(kl_divergence(best, ref)) / len(task.prompts)
        reward += float((best.exp() * r).sum()) / len(task.prompts)
    return kl, reward
