"""What policy algorithms share: from scores and KL to per-token rewards, from rewards to advantages, from advantages to the loss.

    rewards    r_t = score placed at the end (or where a reward placed it) - beta penalty_t
    credit     A = (assign(r, V) - shift) / spread        `assign` is linear, so advantages can be split into their causes
    loss       surrogate(log pi, A) [x mismatch weight] [+ beta KL loss] [- entropy bonus], added up once by global counts

An algorithm is a file that overrides `assign`, and `scale` or `surrogate` where it differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.config import Config
from trimtab.maths import kl
from trimtab.maths.advantages import rewards_to_go
from trimtab.maths.policy_losses import Level, importance_weighted, mismatch_weights, response_sum
from trimtab.maths.reductions import Aggregation, aggregate, mean_over_pairs, to_column, to_rows
from trimtab.maths.value_losses import squared_error

Role = Literal["frozen", "synced", "ema", "none"]
Estimator = Literal["k1", "k2", "k3", "k1+", "k3+", "full", "rao-blackwell"]


class KLConfig(Config):
    """The penalty beta * KL(pi || pi_ref). By default k1 in the reward, per token and detached, which has the right gradient (maths.kl)."""

    beta: float = Field(0.05, ge=0, description="weight of the penalty; 0 optimises the reward alone")
    place: Literal["reward", "loss"] = Field(
        "reward", description="in the reward (detached), or as a term of the loss; see docs/mathematics.md"
    )
    estimator: Estimator = Field(
        "k1",
        description="k1, k2, k3; k1+ and k3+ (their value, k2's gradient); full: over the vocabulary at every prefix; "
        "rao-blackwell: full as a loss with the KL-to-go in the reward (unbiased, least variance)",
    )
    level: Level = Field("token", description="of a loss-placed k1, k2, k3: of each token's log-ratio, or of the whole response's")
    ratio_weighted: bool = Field(
        False,
        description="multiply a loss-placed penalty by pi / pi_old. With k1 and k3 the ratio's gradient counts too (DeepSeek-V3.2): of the "
        "whole response they then have the gradient of the KL; with the others it only corrects later inner epochs",
    )
    target: float | None = Field(None, gt=0, description="adapt beta so that KL per response (nats) comes near this; null keeps beta fixed")
    horizon: int = Field(10_000, gt=0, description="responses over which an adaptive beta can change by a factor of about e")

    @model_validator(mode="after")
    def _placeable(self) -> KLConfig:
        if self.place == "reward" and self.estimator in ("k1+", "k3+", "rao-blackwell"):
            raise ValueError(f"kl.estimator={self.estimator} has a gradient of its own: it needs kl.place=loss")
        if self.level == "sequence" and (self.place == "reward" or self.needs_full):
            raise ValueError("kl.level=sequence is for k1, k2, k3, k1+, k3+ with kl.place=loss")
        return self

    @property
    def needs_full(self) -> bool:
        return self.beta > 0 and self.estimator in ("full", "rao-blackwell")

    @property
    def in_reward(self) -> bool:
        """Whether a part of the penalty is in the reward."""
        return self.beta > 0 and (self.place == "reward" or self.estimator == "rao-blackwell")


class KLPenalty:
    """The KL coefficient in force, fixed or adaptive, and what it adds to rewards and losses."""

    def __init__(self, config: KLConfig) -> None:
        self.config, self.beta = config, config.beta

    def rewards(self, batch: Batch) -> Tensor:
        """-beta penalty_t of every token of the policy's own, without gradient; zero where the penalty is (only) in the loss."""
        old = batch.tokens["logprobs_old"]
        if not self.beta or (self.config.place == "loss" and self.config.estimator != "rao-blackwell"):
            return torch.zeros_like(old)
        if self.config.estimator == "rao-blackwell":
            return kl.kl_to_go_rewards(batch.tokens["full_kl"] * batch.mask, batch.last_token, self.beta)
        return -self.beta * self._estimate(old, batch.tokens["logprobs_ref"], batch.tokens.get("full_kl")) * batch.mask

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor | float:
        """beta penalty_t as a term of the loss, with gradient; a whole response's penalty is counted once, shared by its tokens."""
        if not self.beta or self.config.place == "reward":
            return 0.0
        assert outputs.logprobs is not None
        logprobs, reference, old = outputs.logprobs, batch.tokens.get("logprobs_ref"), batch.tokens["logprobs_old"]
        if self.config.level == "sequence":
            columns = [response_sum(x, batch.mask, batch.response_of_token) for x in (logprobs, reference, old) if x is not None]
            logprobs, reference, old = columns
        penalty = self._estimate(logprobs, reference, outputs.full_kl)
        if self.config.ratio_weighted:
            ratio = (logprobs - old).exp()
            penalty = penalty * (ratio if self.config.estimator in ("k1", "k3") else ratio.detach())
        if self.config.level == "sequence":
            ones = torch.ones_like(penalty)
            penalty = penalty / response_sum(ones, batch.mask, batch.response_of_token).clamp(min=1)
        return self.beta * penalty

    def _estimate(self, logprobs: Tensor, reference: Tensor | None, full: Tensor | None) -> Tensor:
        if self.config.estimator in ("full", "rao-blackwell"):
            assert full is not None
            return full
        assert reference is not None
        name = self.config.estimator
        if name.endswith("+"):
            value = {"k1+": kl.k1, "k3+": kl.k3}[name](logprobs, reference)
            return kl.straight_through(value, kl.k2(logprobs, reference))
        return {"k1": kl.k1, "k2": kl.k2, "k3": kl.k3}[name](logprobs, reference)

    def adapt(self, batch: Batch) -> None:
        """After a step: move an adaptive beta towards its target."""
        if self.config.target is not None:
            per_response = batch.sum_by_response(kl.k1(batch.tokens["logprobs_old"], batch.tokens["logprobs_ref"]) * batch.mask)
            measured = float(per_response.mean())
            self.beta = kl.adapted_beta(self.beta, measured, self.config.target, len(batch.lengths), self.config.horizon)


class ReferenceConfig(Config):
    """Which policy the KL and log-ratios are taken against."""

    role: Role = Field(
        "frozen",
        description="frozen: the model as it starts; synced: a copy of the policy, taken anew every few steps; "
        "ema: a moving average of the policy; none: no reference",
    )
    decay: float = Field(0.99, ge=0, lt=1, description="role=ema: weight of the old average at each step")
    every: int = Field(64, gt=0, description="role=synced: steps between copies of the policy")


class MismatchConfig(Config):
    """A correction of the difference between the engine that sampled and the trainer's own policy: weight pi_old / pi_sampler."""

    kind: Literal["none", "truncate", "mask"] = Field(
        "none", description="truncate: weights of at most `high`; mask: 0 outside [low, high]"
    )
    level: Level = Field("token", description="the ratio of each token, or of the whole response")
    low: float = Field(0.5, ge=0, description="smallest weight that kind=mask keeps")
    high: float = Field(2.0, gt=0, description="largest weight")


class PolicyGradientConfig(Config):
    """The settings every policy algorithm has."""

    kl: KLConfig = Field(default_factory=KLConfig, description="the penalty that keeps the policy near the reference")
    epochs: int = Field(1, gt=0, description="passes over every rollout batch")
    minibatches: int = Field(1, gt=0, description="optimiser steps per pass")
    discount: float = Field(1.0, gt=0, le=1, description="gamma")
    entropy_weight: float = Field(0.0, ge=0, description="weight of an entropy bonus")
    aggregation: Aggregation = Field("token", description="how per-token losses are averaged")
    length: int | None = Field(None, gt=0, description="the constant of aggregation=fixed-length; null: sampling.max_tokens")
    target_kl: float | None = Field(None, gt=0, description="stop the inner epochs when KL(pi_old || pi) per token exceeds this")
    mismatch: MismatchConfig = Field(default_factory=MismatchConfig, description="correction where sampler and trainer differ")
    mask_truncated: bool = Field(False, description="leave responses that were cut off out of the loss")
    resample: int = Field(0, ge=0, description="rounds of further prompts in place of groups whose responses all scored alike")


class PolicyGradient:
    """Base of the policy algorithms.

    Columns read: reward (responses), logprobs_old, logprobs_ref, logprobs_sampler, and with a critic values_old (tokens);
    added: token_rewards, advantages, and with a critic returns.
    """

    Config: ClassVar[type[PolicyGradientConfig]] = PolicyGradientConfig
    uses_critic: ClassVar[bool] = False
    greedy_baseline: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config, self.penalty = config, KLPenalty(config.kl)

    @property
    def compares(self) -> bool:
        """Whether a response is credited by comparison with the others of its group, so that one alone teaches nothing."""
        return False

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        """Advantages from per-token rewards (and values), linear in both."""
        raise NotImplementedError

    def scale(self, batch: Batch, raw: Tensor) -> tuple[Tensor, Tensor]:
        """What is subtracted from the assigned advantages, and what they are divided by."""
        return raw.new_zeros(()), raw.new_ones(())

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Per-token loss terms, and where a clip cut the gradient off (None: never)."""
        return importance_weighted(logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"]), None

    def credit(self, batch: Batch) -> Batch:
        """Rewards and advantages (and returns) of a rollout batch."""
        rewards, values = self.rewards(batch), batch.tokens.get("values_old") if self.uses_critic else None
        raw = self.assign(batch, rewards, values)
        shift, spread = self.scale(batch, raw)
        batch = batch.with_tokens(token_rewards=rewards, advantages=(raw - shift) / spread)
        if values is not None:
            batch = batch.with_tokens(returns=raw + values)
        self.penalty.adapt(batch)
        return batch.without_truncated() if self.config.mask_truncated else batch

    def rewards(self, batch: Batch) -> Tensor:
        """Score and penalty of every token; their sum over a response is its return."""
        return self.scores(batch) + self.penalty.rewards(batch)

    def scores(self, batch: Batch) -> Tensor:
        """The shaped reward where it belongs: where the reward placed it, the rest at the last token."""
        placed = batch.tokens.get("placed")
        if placed is None:
            return kl.place_scores(batch.responses["reward"], batch.last_token, batch.tokens["logprobs_old"])
        rest = batch.responses["reward"] - batch.sum_by_response(placed)
        return kl.place_scores(rest, batch.last_token, batch.tokens["logprobs_old"]) + placed

    def policy_loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.logprobs is not None
        terms, clipped = self.surrogate(outputs.logprobs, batch)
        weights = self._mismatch(batch)
        terms = (terms if weights is None else terms * weights) + self.penalty.loss(outputs, batch)
        if self.config.entropy_weight:
            assert outputs.entropy is not None
            terms = terms - self.config.entropy_weight * outputs.entropy
        sizes = {"tokens": counts.tokens, "responses": counts.responses, "length": self.config.length or 1}
        value = aggregate(terms, batch.mask, batch.response_of_token, self.config.aggregation, **sizes)
        return Loss(value, *self._metrics(outputs, batch, counts, clipped, weights))

    def value_loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.values is not None
        return Loss((squared_error(outputs.values, batch.tokens["returns"]) * batch.mask).sum() / max(1, counts.tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.penalty.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.penalty.beta = float(state["beta"])

    def _mismatch(self, batch: Batch) -> Tensor | None:
        how = self.config.mismatch
        if how.kind == "none":
            return None
        columns = batch.tokens["logprobs_old"], batch.tokens["logprobs_sampler"], batch.mask, batch.response_of_token
        return mismatch_weights(*columns, how.kind, how.level, how.low, how.high)

    @torch.no_grad()
    def _metrics(
        self, outputs: Outputs, batch: Batch, counts: Counts, clipped: Tensor | None, weights: Tensor | None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        assert outputs.logprobs is not None
        mask, log_ratio, n = batch.mask, outputs.logprobs - batch.tokens["logprobs_old"], max(1, counts.tokens)
        means = {"approx_kl": (torch.expm1(log_ratio) - log_ratio)[mask].sum() / n}
        if clipped is not None:
            means["clip_fraction"] = clipped[mask].to(log_ratio.dtype).sum() / n
        if weights is not None:
            means["mismatch_weight"] = weights[mask].sum() / n
        if outputs.entropy is not None:
            means["entropy"] = outputs.entropy[mask].sum() / n
        ratio = torch.cat([log_ratio[mask].exp(), log_ratio.new_ones(1)])  # a micro-batch may have no token of its own to learn from
        return means, {"ratio_max": ratio.max(), "ratio_inverse_max": (1 / ratio).max()}


def per_response(batch: Batch, x: Tensor) -> Tensor:
    """A response column given to each token of its response."""
    return x[batch.response_of_token]


def to_go(batch: Batch, rewards: Tensor, discount: float) -> Tensor:
    """Discounted reward-to-go of every token."""
    return to_column(rewards_to_go(to_rows(rewards, batch.lengths), discount), batch.lengths)


def over_pairs(x: Tensor, batch: Batch, counts: Counts) -> Tensor:
    """Mean over the pairs of each prompt, then over all prompts of the minibatch."""
    better, _ = batch.pairs()
    return mean_over_pairs(x, batch.group_of_response[better], groups=counts.groups)
