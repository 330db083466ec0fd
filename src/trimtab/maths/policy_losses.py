"""Policy-gradient surrogates, per token. Minimising them raises the probability of what had a positive advantage.

rho = pi / pi_old is the ratio to the policy that sampled. Every surrogate has at pi = pi_old the policy gradient -A grad log pi; they
differ in what happens further away. Functions that cut the gradient off also say where.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Level = Literal["token", "sequence"]


def importance_weighted(
    logprobs: Float[Tensor, " tokens"], logprobs_old: Float[Tensor, " tokens"], advantages: Float[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """-rho A. Its gradient, -rho A grad log pi, is at pi = pi_old REINFORCE's (Williams 1992): grad rho = grad pi / pi_old = grad log pi.

    (A text that drops the denominator there, E[grad pi A], has the wrong gradient.)
    """
    return -torch.exp(logprobs - logprobs_old) * advantages


def ppo_clip(
    logprobs: Float[Tensor, " tokens"],
    logprobs_old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    low: float,
    high: float | None = None,
    dual_clip: float | None = None,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), and where the clip cut the gradient off; `high` is `low` if not given.

    The minimum is over the signed products: for A < 0 a ratio below 1 - low is clipped and one above 1 + high is not.
    (Clipping the ratio first, min(rho, 1 + high) A, as some textbooks print, does the opposite for A < 0.)
    dual_clip c > 1 also bounds what a negative advantage can do: max(., c A) where A < 0 (Ye et al. 2020).
    Source: Schulman et al. 2017, eq. 7; unequal bounds: Yu et al. 2025 (DAPO).
    """
    ratio = torch.exp(logprobs - logprobs_old)
    free, bounded = ratio * advantages, ratio.clamp(1 - low, 1 + (low if high is None else high)) * advantages
    gain, clipped = torch.minimum(free, bounded), bounded < free
    if dual_clip is not None:
        floor = dual_clip * advantages
        cut = (advantages < 0) & (gain < floor)
        gain, clipped = torch.where(cut, floor, gain), clipped | cut
    return -gain, clipped


def clipped_importance(
    logprobs: Float[Tensor, " tokens"],
    logprobs_old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    low: float,
    high: float,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """-sg[clip(rho, 1 - low, 1 + high)] A log pi, and where the weight was clipped. No token ever loses its gradient.

    low = 1 leaves the weight free below. Source: MiniMax 2025 (CISPO), eq. 4.
    """
    ratio = torch.exp(logprobs - logprobs_old).detach()
    weight = ratio.clamp(1 - low, 1 + high)
    return -weight * advantages * logprobs, weight != ratio


def soft_gate(
    logprobs: Float[Tensor, " tokens"],
    logprobs_old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    positive: float,
    negative: float,
) -> Float[Tensor, " tokens"]:
    """-(4 / tau) sigma(tau (rho - 1)) A with temperature tau = `positive` where A > 0, else `negative`.

    Instead of a cut-off the gradient's weight 4 sigma (1 - sigma) rho falls off smoothly from 1 at rho = 1. Source: Gao et al. 2025 (SAPO).
    """
    ratio = torch.exp(logprobs - logprobs_old)
    tau = torch.where(advantages > 0, ratio.new_tensor(positive), ratio.new_tensor(negative))
    return -torch.sigmoid(tau * (ratio - 1)) * (4 / tau) * advantages


def response_mean(
    column: Float[Tensor, " tokens"], mask: Bool[Tensor, " tokens"], response_of_token: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """The mean of a token column over the unmasked tokens of each response, given back to each of its tokens."""
    return response_sum(column, mask, response_of_token) / response_sum(torch.ones_like(column), mask, response_of_token).clamp(min=1)


def response_sum(
    column: Float[Tensor, " tokens"], mask: Bool[Tensor, " tokens"], response_of_token: Int[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """The sum of a token column over the unmasked tokens of each response, given back to each of its tokens."""
    total = column.new_zeros(int(response_of_token.max()) + 1).index_add(0, response_of_token, column * mask)
    return total[response_of_token]


def sequence_clip(
    logprobs: Float[Tensor, " tokens"],
    logprobs_old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    mask: Bool[Tensor, " tokens"],
    response_of_token: Int[Tensor, " tokens"],
    low: float,
    high: float,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """PPO's clip on the length-normalised ratio of the whole response, s = (pi(y|x) / pi_old(y|x))^(1/|y|), at each of its tokens.

    Meant for one advantage per response and aggregation "sequence". Source: Zheng et al. 2025 (GSPO), eq. 5-7.
    """
    log_ratio = response_mean(logprobs - logprobs_old, mask, response_of_token)
    return ppo_clip(log_ratio, torch.zeros_like(log_ratio), advantages, low, high)


def geometric_clip(
    logprobs: Float[Tensor, " tokens"],
    logprobs_old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    mask: Bool[Tensor, " tokens"],
    response_of_token: Int[Tensor, " tokens"],
    low: float,
    high: float,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """-exp(mean_t l_t) A with every token's log-ratio cut where it favours the update: l = s min(s log rho, s clip(log rho, -low, high)),

    s = sign(A): the geometric mean of clipped ratios, less moved by one outlying token than their arithmetic mean. At each token of the
    response; meant for one advantage per response and aggregation "sequence". Source: Zhao et al. 2025 (GMPO), eq. 4.
    """
    log_ratio = logprobs - logprobs_old
    sign = torch.where(advantages >= 0, 1.0, -1.0).to(log_ratio.dtype)
    free, bounded = sign * log_ratio, sign * log_ratio.clamp(-low, high)
    mean = response_mean(sign * torch.minimum(free, bounded), mask, response_of_token)
    return -torch.exp(mean) * advantages, bounded < free


def mismatch_weights(
    logprobs_old: Float[Tensor, " tokens"],
    logprobs_sampler: Float[Tensor, " tokens"],
    mask: Bool[Tensor, " tokens"],
    response_of_token: Int[Tensor, " tokens"],
    kind: Literal["truncate", "mask"],
    level: Level,
    low: float,
    high: float,
) -> Float[Tensor, " tokens"]:
    """w = pi_old / pi_sampler, of each token or of the whole response, where the engine that sampled is not exactly the trainer's policy.

    "truncate": min(w, high), biased but of bounded variance (TIS, Yao et al. 2025). "mask": w where low <= w <= high, else 0 (MIS).
    A factor of the policy loss's terms, without gradient.
    """
    log_weight = (logprobs_old - logprobs_sampler).detach()
    if level == "sequence":
        log_weight = response_sum(log_weight, mask, response_of_token)
    weight = torch.exp(log_weight)
    return weight.clamp(max=high) if kind == "truncate" else weight * ((weight >= low) & (weight <= high))
