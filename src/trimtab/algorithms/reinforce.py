"""REINFORCE (Williams 1992) with a baseline, and its form for language models with a leave-one-out baseline, RLOO (Ahmadian et al. 2024).

credit     reinforce: A_t = sum_{k >= t} gamma^(k-t) r_k - b          rloo: A = sum_k r_k - mean of the group's other responses
policy     -rho A   (at rho = 1 the gradient of -A log pi)
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.algorithms.base import PolicyGradient, PolicyGradientConfig, per_response, to_go
from trimtab.batch import Batch
from trimtab.maths.advantages import group_mean, leave_one_out


class REINFORCEConfig(PolicyGradientConfig):
    """The settings of REINFORCE."""

    baseline: Literal["none", "batch", "group", "leave-one-out"] = Field(
        "leave-one-out",
        description="what is subtracted: nothing; the mean return of the batch, of the prompt's group, or of the group's other responses",
    )


class REINFORCE(PolicyGradient):
    """See the module's docstring."""

    Config = REINFORCEConfig
    config: REINFORCEConfig

    @property
    def compares(self) -> bool:
        return self.config.baseline in ("group", "leave-one-out")

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        returns, group = batch.sum_by_response(rewards), batch.group_of_response
        baseline = torch.zeros_like(returns)
        if self.config.baseline == "batch":
            baseline = returns.mean().expand_as(returns)
        elif self.config.baseline == "group":
            baseline = group_mean(returns, group)
        elif self.config.baseline == "leave-one-out":
            baseline = leave_one_out(returns, group)
        return to_go(batch, rewards, self.config.discount) - per_response(batch, baseline)


class RLOO(PolicyGradient):
    """Every token of a response gets the whole response's return, minus that of the others."""

    compares = True

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        returns = batch.sum_by_response(rewards)
        return per_response(batch, returns - leave_one_out(returns, batch.group_of_response))
