"""Losses on single responses that are desirable or not, and the likelihood of the desirable ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.preferences.base import (
    LabelConfig,
    LabelLoss,
    NoReferenceConfig,
    reference_field,
)
from trimtab.batch import Batch, Counts
from trimtab.maths import preference_losses as losses


class KTOConfig(LabelConfig):
    """Settings of KTO."""

    desirable_weight: float = Field(1.0, gt=0, description="weight of desirable responses; balance it with how many there are")
    undesirable_weight: float = Field(1.0, gt=0, description="weight of undesirable responses")


class KTO(LabelLoss):
    """Kahneman-Tversky optimisation: gains and losses against z, the KL estimated on mismatched prompts and responses."""

    Config = KTOConfig
    needs_mismatched = True

    def terms(self, h: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        config = self.config
        return losses.kto(h, desirable, baseline, config.beta, config.desirable_weight, config.undesirable_weight)

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        """z = max(0, mean h of the mismatched responses)."""
        assert mismatched is not None
        return max(0.0, float(self.log_ratios(mismatched.tokens["logprobs_now"], mismatched).mean()))


class BCO(LabelLoss):
    """Binary classifier optimisation: a logistic classifier of responses with delta, the running mean of rewards, as threshold."""

    Config = LabelConfig
    needs_own = True

    def __init__(self, config: Any, name: str) -> None:
        super().__init__(config, name)
        self.mean, self.count = 0.0, 0

    def terms(self, h: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        return losses.bco(h, desirable, self.config.beta * baseline, self.config.beta)

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        """The mean of h over all labelled responses seen so far, those of this minibatch among them."""
        if training:
            h = self.log_ratios(batch.tokens["logprobs_now"], batch)[batch.responses["desirable"] != 0.5]
            self.count += len(h)
            self.mean += float((h - self.mean).sum()) / max(1, self.count)
        return self.mean

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.mean, self.count = float(state["mean"]), int(state["count"])


class NLLConfig(LabelConfig):
    """Settings of the likelihood in a mixture."""

    reference: NoReferenceConfig = reference_field(NoReferenceConfig)


class NLL(LabelLoss):
    """Negative log-likelihood of the desirable responses: fine-tuning, as a member of a mixture."""

    Config = NLLConfig

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        return self.nll(logprobs, batch, counts)

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        return 0.0
