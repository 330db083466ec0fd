"""Estimates of KL(pi || pi_ref) from samples y ~ pi, where they can be put, and the coefficient that weighs them.

Per token, with log-ratio l_t = log pi(y_t | s_t) - log pi_ref(y_t | s_t):

    k1 = l               unbiased, can be negative
    k2 = l^2 / 2         biased, low variance near l = 0
    k3 = e^-l - 1 + l    unbiased, never negative; its variance is unbounded where pi << pi_ref

Source: Schulman, "Approximating KL divergence" (2020). What a *gradient* does depends on where the estimate is put. With samples from pi
(Tang and Munos 2025; every line is held against autograd on exact expectations in the tests):

    k1 in the reward, detached                    grad KL(pi || ref): right, the default
    k2 as a loss of the whole response            grad KL(pi || ref): right, of higher variance
    per-prefix KL as a loss + KL-to-go in the reward ("rao-blackwell")   grad KL(pi || ref): right, lowest variance
    k1 as a loss                                  0: no penalty at all
    k3 as a loss of the whole response            grad KL(ref || pi): the other direction
    k2, or the full per-prefix KL, per token as a loss      misses what a token does to later KL
    k3 per token as a loss (GRPO)                 both faults
    k2 in the reward                              E[k2 grad log pi], no KL's: vanishes to first order near pi_ref
    k3 in the reward                              grad KL(pi || ref) less what k3 as a loss has: vanishes to first order near pi_ref
    the full per-prefix KL in the reward          only what a token does to later KL: vanishes to first order near pi_ref
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor


def k1(logprobs: Float[Tensor, "*n"], logprobs_ref: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """log pi - log pi_ref. In the reward: the right gradient. As a loss: an expected gradient of zero."""
    return logprobs - logprobs_ref


def k2(logprobs: Float[Tensor, "*n"], logprobs_ref: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """(log pi - log pi_ref)^2 / 2. As a loss of whole responses: the right gradient, l grad log pi; per token it misses later KL."""
    return 0.5 * (logprobs - logprobs_ref).square()


def k3(logprobs: Float[Tensor, "*n"], logprobs_ref: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """pi_ref / pi - 1 - log(pi_ref / pi). As a loss of whole responses: the gradient of KL(pi_ref || pi), the other direction."""
    log_u = logprobs_ref - logprobs
    return log_u.expm1() - log_u


def straight_through(value: Float[Tensor, "*n"], gradient: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The value of one estimate with the gradient of another: k1+ and k3+ report k1 or k3 and descend k2."""
    return gradient + (value - gradient).detach()


def kl_to_go_rewards(full: Float[Tensor, " tokens"], last_token: Int[Tensor, " responses"], beta: float) -> Float[Tensor, " tokens"]:
    """-beta KL(pi(. | s_t+1) || pi_ref(. | s_t+1)) as the reward of token t, 0 for a response's last: what a token does to *later* KL.

    With the per-prefix KL itself as a loss, it makes the Rao-Blackwellised gradient, because

        grad E sum_t KL_t = E sum_t [grad KL_t + grad log pi(y_t | s_t) sum_{k > t} KL_k].     Source: Amini et al. 2025.
    """
    rewards = -beta * full.detach().roll(-1)
    return rewards.index_fill(0, last_token, 0.0)


def place_scores(
    scores: Float[Tensor, " responses"], last_token: Int[Tensor, " responses"], like: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """Token rewards that are r(x, y) at each response's last token and 0 elsewhere."""
    return like.new_zeros(like.shape).index_add(0, last_token, scores.to(like.dtype))


def penalised_rewards(
    scores: Float[Tensor, " responses"], penalty: Float[Tensor, " tokens"], last_token: Int[Tensor, " responses"], beta: float
) -> Float[Tensor, " tokens"]:
    """Per-token rewards r_t = -beta penalty_t + 1[t = T] r(x, y), without gradient; the penalty is the log-ratio l_t.

    Their sum over a response is r(x, y) - beta log(pi / pi_ref)(y | x). Source: Stiennon et al. 2020, Ouyang et al. 2022.
    """
    return place_scores(scores, last_token, penalty) - beta * penalty.detach()


def adapted_beta(beta: float, kl: float, target: float, responses: int, horizon: int) -> float:
    """beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon): a proportional controller in log space.

    kl, target: nats per response; n: responses in this step. Source: Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return beta * (1.0 + error * responses / horizon)
