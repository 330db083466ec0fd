"""Credit by comparison within a group: what the responses to one prompt scored beside each other."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.base import PolicyGradient, PolicyGradientConfig, per_response
from trimtab.batch import Batch
from trimtab.maths.advantages import group_deviation, group_mean
from trimtab.maths.reductions import Aggregation


class GroupConfig(PolicyGradientConfig):
    """The settings of algorithms that compare the responses of a group."""

    divide_by_deviation: bool = Field(True, description="divide by the group's standard deviation: weighs easy and hard prompts up")
    aggregation: Aggregation = Field("sequence", description="how per-token losses are averaged")


class GroupRelative(PolicyGradient):
    """A = r - mean of the group, divided by the group's standard deviation (G - 1, plus 1e-4) if asked."""

    Config = GroupConfig
    config: GroupConfig
    compares = True

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        returns = batch.sum_by_response(rewards)
        return per_response(batch, returns - group_mean(returns, batch.group_of_response))

    def scale(self, batch: Batch, raw: Tensor) -> tuple[Tensor, Tensor]:
        shift, one = super().scale(batch, raw)
        if not self.config.divide_by_deviation:
            return shift, one
        return shift, per_response(batch, group_deviation(raw[batch.last_token], batch.group_of_response)) + 1e-4
