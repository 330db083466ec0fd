"""Geometric-mean policy optimisation (Zhao et al. 2025): the geometric mean of a response's clipped ratios.

credit     as grpo
policy     -exp(mean_t clipped log rho_t) A,     every log rho_t within [-low, high] where it favours the update
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.group import GroupConfig, GroupRelative
from trimtab.batch import Batch
from trimtab.maths.policy_losses import geometric_clip


class GMPOConfig(GroupConfig):
    """The settings of GMPO."""

    clip: float = Field(0.4, gt=0, description="the log-ratio is kept above -clip")
    clip_high: float = Field(0.4, gt=0, description="and below clip_high")


class GMPO(GroupRelative):
    """See the module's docstring."""

    Config = GMPOConfig
    config: GMPOConfig

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        columns = logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"], batch.mask, batch.response_of_token
        return geometric_clip(*columns, self.config.clip, self.config.clip_high)
