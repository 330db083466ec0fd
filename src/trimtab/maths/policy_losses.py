"""Policy-gradient surrogates, per token. Minimising them raises the probability of what had a positive advantage."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def ppo_clip(
    logprobs: Float[Tensor, " tokens"],
    logprobs_old: Float[Tensor, " tokens"],
    advantages: Float[Tensor, " tokens"],
    clip: float,
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """-min(rho A, clip(rho, 1 - clip, 1 + clip) A) with rho = pi / pi_old, and where the clip cut the gradient off.

    The minimum is over the signed products: for A < 0 a ratio below 1 - clip is clipped and one above 1 + clip is not.
    (Clipping the ratio first, min(rho, 1 + clip) A, as some textbooks print, does the opposite for A < 0.)
    Source: Schulman et al. 2017, eq. 7.
    """
    ratio = torch.exp(logprobs - logprobs_old)
    free, bounded = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(free, bounded), bounded < free


def policy_gradient(logprobs: Float[Tensor, " tokens"], advantages: Float[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """-A log pi: its gradient at the sampling policy is the policy gradient (Williams 1992)."""
    return -advantages * logprobs
