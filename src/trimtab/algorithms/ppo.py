"""Proximal policy optimisation (Schulman et al. 2017) as it is used on language models (Ouyang et al. 2022).

sample     y ~ pi_old(. | x)
reward     r_t = -beta (log pi_old - log pi_ref)(y_t) + 1[t = T] r(x, y)
credit     A = GAE(r, V_old), R = A + V_old, A whitened over the whole batch
policy     -min(rho A, clip(rho, 1 - e, 1 + e) A) - c_H H,     rho = pi / pi_old
critic     max((V - R)^2, (clip(V, V_old +- e_v) - R)^2) / 2
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field

from trimtab.algorithms.base import KLConfig, KLPenalty
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.config import Config
from trimtab.maths import advantages as credit
from trimtab.maths.policy_losses import ppo_clip
from trimtab.maths.reductions import Aggregation, aggregate, to_column, to_rows
from trimtab.maths.value_losses import clipped_squared_error, squared_error


class PPOConfig(Config):
    """The settings of PPO."""

    kl: KLConfig = Field(default_factory=KLConfig, description="the penalty that keeps the policy near the reference")
    epochs: int = Field(2, gt=0, description="passes over every rollout batch")
    minibatches: int = Field(1, gt=0, description="optimiser steps per pass")
    clip: float = Field(0.2, gt=0, description="the ratio is kept within [1 - clip, 1 + clip]")
    value_clip: float | None = Field(0.2, gt=0, description="the value may move this far from its rollout value; null: no clipping")
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="0: TD error; 1: Monte-Carlo return minus value")
    whiten_advantages: bool = Field(True, description="mean 0 and standard deviation 1 over all response tokens of the rollout batch")
    entropy_weight: float = Field(0.0, ge=0, description="weight of an entropy bonus")
    aggregation: Aggregation = Field("token", description="how per-token losses are averaged")
    target_kl: float | None = Field(None, gt=0, description="stop the inner epochs when KL(pi_old || pi) per token exceeds this")


class PPO:
    """See the module's docstring. Columns read: reward, logprobs_old, logprobs_ref, values_old; added: advantages, returns."""

    Config = PPOConfig
    uses_critic = True

    def __init__(self, config: PPOConfig) -> None:
        self.config, self.penalty = config, KLPenalty(config.kl)

    def credit(self, batch: Batch) -> Batch:
        values = batch.tokens["values_old"]
        rewards = self.penalty.rewards(batch).to(values.dtype)
        rows = credit.gae(to_rows(rewards, batch.lengths), to_rows(values, batch.lengths), self.config.discount, self.config.gae_lambda)
        raw = to_column(rows, batch.lengths)
        advantages = credit.whiten(raw, batch.mask) if self.config.whiten_advantages else raw
        self.penalty.adapt(batch)
        return batch.with_tokens(token_rewards=rewards, advantages=advantages, returns=raw + values)

    def policy_loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.logprobs is not None
        old = batch.tokens["logprobs_old"]
        terms, clipped = ppo_clip(outputs.logprobs, old, batch.tokens["advantages"].to(old.dtype), self.config.clip)
        if self.config.entropy_weight:
            assert outputs.entropy is not None
            terms = terms - self.config.entropy_weight * outputs.entropy
        sizes = {"tokens": counts.tokens, "responses": counts.responses}
        value = aggregate(terms, batch.mask, batch.response_of_token, self.config.aggregation, **sizes)
        with torch.no_grad():
            mask, log_ratio = batch.mask, outputs.logprobs - old
            ratio = log_ratio.exp()[mask]
            approx_kl = (torch.expm1(log_ratio) - log_ratio)[mask].sum() / counts.tokens
            means = {"approx_kl": approx_kl, "clip_fraction": clipped[mask].sum() / counts.tokens}
            if outputs.entropy is not None:
                means["entropy"] = outputs.entropy[mask].sum() / counts.tokens
        return Loss(value, means, {"ratio_max": ratio.max(), "ratio_inverse_max": (1 / ratio).max()})

    def value_loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.values is not None
        returns, old = batch.tokens["returns"], batch.tokens["values_old"]
        terms = (
            squared_error(outputs.values, returns)
            if self.config.value_clip is None
            else clipped_squared_error(outputs.values, old, returns, self.config.value_clip)
        )
        return Loss((terms * batch.mask).sum() / counts.tokens)

    def state_dict(self) -> dict[str, Any]:
        return self.penalty.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty.load_state_dict(state)
