"""Losses that look at more than one pair at once: whole rankings, and order statistics of a whole minibatch."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.algorithms.preferences.base import (
    LabelConfig,
    LabelLoss,
    PairLoss,
    PreferenceLoss,
    PreferenceLossConfig,
    beta_field,
    smoothing_field,
)
from trimtab.batch import Batch, Counts
from trimtab.maths import preference_losses as losses


class RankingConfig(PreferenceLossConfig):
    """Settings of the Plackett-Luce loss."""

    beta: float = beta_field(0.1)
    log_ratio: Literal["sum", "mean"] = Field("sum", description="h of a response: sum over its tokens, or mean per token")

    @property
    def scale(self) -> float:
        return self.beta


class PlackettLuce(PairLoss):
    """DPO for whole rankings: the probability of choosing the best, then the best of the rest, and so on."""

    Config = RankingConfig

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        h = self.log_ratios(logprobs, batch)
        return losses.plackett_luce(h, batch.responses["judgement"], batch.group_of_response, self.config.beta).sum() / counts.groups


class OrderStatistics(PreferenceLoss):
    """A loss that sorts the whole minibatch. `prepare` takes its value L and its slopes g_i = dL / dh_i before the update;

    a micro-batch's loss is then its share of L + sum_i g_i (h_i - h_i without gradient): the same value, the same gradient.
    """

    needs_own = True

    def of_minibatch(self, h: Tensor, batch: Batch) -> Tensor:
        """The loss of a whole minibatch, from h of its responses."""
        raise NotImplementedError

    def prepare(self, batch: Batch, mismatched: Batch | None = None, *, training: bool = True) -> Batch:
        batch = super().prepare(batch, mismatched, training=training)
        with torch.enable_grad():
            h = self.log_ratios(batch.tokens["logprobs_now"], batch).detach().requires_grad_()
            value = self.of_minibatch(h, batch)
            (slope,) = torch.autograd.grad(value, h)
        share = torch.full_like(slope, float(value.detach()) / len(slope))
        return batch.with_responses(**{f"{self.name}_slope": slope, f"{self.name}_value": share})

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        h = self.log_ratios(logprobs, batch)
        slope, share = batch.responses[f"{self.name}_slope"], batch.responses[f"{self.name}_value"]
        return share.sum() + (slope * (h - h.detach())).sum()


class AOTConfig(PreferenceLossConfig):
    """Settings of AOT on pairs."""

    beta: float = beta_field(0.1)
    log_ratio: Literal["sum", "mean"] = Field("sum", description="h of a response: sum over its tokens, or mean per token")
    label_smoothing: float = smoothing_field()

    @property
    def scale(self) -> float:
        return self.beta


class AOT(OrderStatistics, PairLoss):
    """Alignment by optimal transport: the policy's margins above the reference's margins, as distributions."""

    Config = AOTConfig

    def of_minibatch(self, h: Tensor, batch: Batch) -> Tensor:
        better, worse = batch.pairs()
        against = torch.zeros_like(h)
        if self.reference.role != "none":
            against = self.over_tokens(batch.tokens["logprobs_ref"].double() * batch.mask, batch)
        own = h + against
        upper, lower = (x[better] - x[worse] for x in (own, against))
        return losses.aot(upper, lower, self.config.beta, self.config.label_smoothing).mean()


class UnpairedAOTConfig(LabelConfig):
    """Settings of AOT on labelled responses."""

    label_smoothing: float = smoothing_field()


class UnpairedAOT(OrderStatistics, LabelLoss):
    """Alignment by optimal transport: log-ratios of desirable responses above those of undesirable ones, as distributions."""

    Config = UnpairedAOTConfig

    def of_minibatch(self, h: Tensor, batch: Batch) -> Tensor:
        label = batch.responses["desirable"]
        good, bad = h[label == 1], h[label == 0]
        if not len(good) or not len(bad):
            return 0 * h.sum()  # a minibatch of one kind has nothing to compare
        return losses.aot(good, bad, self.config.beta, self.config.label_smoothing).mean()

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        """Half-way between the means of the two kinds; it serves the metrics only."""
        h, label = self.log_ratios(batch.tokens["logprobs_now"], batch), batch.responses["desirable"]
        means = [float(h[label == kind].mean()) for kind in (0, 1) if bool((label == kind).any())]
        return sum(means) / len(means) if means else 0.0
