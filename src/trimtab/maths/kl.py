"""Estimates of KL(pi || pi_ref) from samples y ~ pi, and the coefficient that weighs it.

Per token, with log-ratio l_t = log pi(y_t | s_t) - log pi_ref(y_t | s_t):

    k1 = l           unbiased, can be negative
    k2 = l^2 / 2     biased, low variance near l = 0
    k3 = e^-l - 1 + l   unbiased, never negative; its variance is unbounded where pi << pi_ref

Source: Schulman, "Approximating KL divergence" (2020). What a *gradient* does depends on where the estimate is put: k1 in the
reward, detached, gives exactly the gradient of KL(pi || pi_ref); k1 as a loss gives an expected gradient of zero, and per-token
k2 or k3 as a loss misses what a token does to later KL (Tang and Munos 2025). Hence k1 in the reward is the default.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def k1(logprobs: Float[Tensor, "*n"], logprobs_ref: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log pi - log pi_ref."""
    return logprobs - logprobs_ref


def k2(logprobs: Float[Tensor, "*n"], logprobs_ref: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """(log pi - log pi_ref)^2 / 2."""
    return 0.5 * (logprobs - logprobs_ref).square()


def k3(logprobs: Float[Tensor, "*n"], logprobs_ref: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """pi_ref / pi - 1 - log(pi_ref / pi)."""
    log_u = logprobs_ref - logprobs
    return log_u.expm1() - log_u


def penalised_rewards(
    scores: Float[Tensor, " responses"],
    log_ratio: Float[Tensor, " tokens"],
    last_token: Float[Tensor, " responses"] | Tensor,
    beta: float,
) -> Float[Tensor, " tokens"]:
    """Per-token rewards r_t = -beta log(pi / pi_ref)(y_t) + 1[t = T] r(x, y), without gradient.

    Their sum over a response is r(x, y) - beta log(pi / pi_ref)(y | x). Source: Stiennon et al. 2020, Ouyang et al. 2022.
    """
    rewards = -beta * log_ratio.detach()
    return rewards.index_add(0, last_token, scores.to(rewards.dtype))


def adapted_beta(beta: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon): a proportional controller in log space.

    kl, target: nats per response; n: responses in this step. Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * responses / horizon)
