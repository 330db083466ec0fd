"""REINFORCE++ (Hu 2025): PPO's clip and per-token KL without a critic; advantages are normalised over the whole batch.

credit     A_t = sum_{k >= t} r_k (- the group's mean return), whitened over all tokens of the batch
policy     -min(rho A, clip(rho, 1 - e, 1 + e) A)
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.base import PolicyGradient, PolicyGradientConfig, per_response, to_go
from trimtab.batch import Batch
from trimtab.maths.advantages import group_mean, moments
from trimtab.maths.policy_losses import ppo_clip


class REINFORCEPPConfig(PolicyGradientConfig):
    """The settings of REINFORCE++."""

    clip: float = Field(0.2, gt=0, description="the ratio is kept within [1 - clip, 1 + clip]")
    group_baseline: bool = Field(False, description="subtract the mean return of the prompt's group first (REINFORCE++-baseline)")


class REINFORCEPP(PolicyGradient):
    """See the module's docstring."""

    Config = REINFORCEPPConfig
    config: REINFORCEPPConfig

    @property
    def compares(self) -> bool:
        return self.config.group_baseline

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        advantages = to_go(batch, rewards, self.config.discount)
        if self.config.group_baseline:
            advantages = advantages - per_response(batch, group_mean(batch.sum_by_response(rewards), batch.group_of_response))
        return advantages

    def scale(self, batch: Batch, raw: Tensor) -> tuple[Tensor, Tensor]:
        return moments(raw, batch.mask)

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        return ppo_clip(logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"], self.config.clip)
