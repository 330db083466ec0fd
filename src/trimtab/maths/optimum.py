"""The exact optimum of E[r] - beta KL(pi || pi_ref) where all responses to a prompt can be listed.

    pi*(y) = pi_ref(y) exp(r(y) / beta) / Z,      Z = sum_y pi_ref(y) exp(r(y) / beta),      J* = beta log Z

and for every policy J* - J(pi) = beta KL(pi || pi*). Arrays run over the responses of one prompt; `logprobs` are those of whole
responses. Source: Ziebart 2010; Rafailov et al. 2023, appendix A.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


def log_partition(rewards: Float[Tensor, " responses"], logprobs_ref: Float[Tensor, " responses"], beta: float) -> Float[Tensor, ""]:
    """log Z. beta log Z is the best value of the objective."""
    return torch.logsumexp(logprobs_ref + rewards / beta, dim=0)


@dataclass(frozen=True)
class PartitionEstimate:
    """An estimate of log Z, its standard error, and how many samples of equal weight it is worth."""

    log_z: float
    error: float
    effective: float


def estimate_log_partition(rewards: Sequence[float], beta: float) -> PartitionEstimate:
    """log Z = log E_{y ~ pi_ref}[exp(r(y) / beta)] from rewards of n independent responses of the reference.

    With w_i = exp(r_i / beta): log mean w; its standard error by the delta method, sd(w) / (mean(w) sqrt(n)); and
    (sum w)^2 / sum w^2 effective samples. The estimate is low by about error^2 / 2 (Jensen); with few effective samples
    neither it nor its error can be trusted, since the responses that matter were hardly sampled.
    Raises ValueError for n < 2.
    """
    if len(rewards) < 2:
        raise ValueError(f"{len(rewards)} samples have no standard error")
    scaled = torch.tensor(rewards, dtype=torch.float64) / beta
    weight = torch.exp(scaled - scaled.max())
    log_z = float(scaled.max() + weight.mean().log())
    error = float(weight.std() / weight.mean()) / math.sqrt(len(weight))
    return PartitionEstimate(log_z, error, float(weight.sum() ** 2 / (weight**2).sum()))


def optimal_logprobs(
    rewards: Float[Tensor, " responses"], logprobs_ref: Float[Tensor, " responses"], beta: float
) -> Float[Tensor, " responses"]:
    """log pi*."""
    return torch.log_softmax(logprobs_ref + rewards / beta, dim=0)


def kl_divergence(logprobs: Float[Tensor, " responses"], logprobs_ref: Float[Tensor, " responses"]) -> Float[Tensor, ""]:
    """KL(pi || pi_ref) in nats; 0 log 0 is 0."""
    return torch.xlogy(logprobs.exp(), logprobs.exp()).sum() - (logprobs.exp() * logprobs_ref).sum()


def objective(
    logprobs: Float[Tensor, " responses"], rewards: Float[Tensor, " responses"], logprobs_ref: Float[Tensor, " responses"], beta: float
) -> Float[Tensor, ""]:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref)."""
    return (logprobs.exp() * rewards).sum() - beta * kl_divergence(logprobs, logprobs_ref)


def implicit_rewards(
    logprobs: Float[Tensor, " responses"], logprobs_ref: Float[Tensor, " responses"], beta: float
) -> Float[Tensor, " responses"]:
    """beta (log pi - log pi_ref): the reward a policy is optimal for, up to the constant beta log Z."""
    return beta * (logprobs - logprobs_ref)
