"""CISPO (MiniMax 2025): the importance weight is clipped, not the gradient, so that no token is left out.

credit     as grpo
policy     -sg[clip(rho, 1 - low, 1 + high)] A log pi
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.group import GroupConfig, GroupRelative
from trimtab.batch import Batch
from trimtab.maths.policy_losses import clipped_importance
from trimtab.maths.reductions import Aggregation


class CISPOConfig(GroupConfig):
    """The settings of CISPO."""

    clip: float = Field(1.0, gt=0, description="the weight is kept above 1 - clip (1: no bound)")
    clip_high: float = Field(4.0, gt=0, description="and below 1 + clip_high")
    aggregation: Aggregation = Field("token", description="how per-token losses are averaged")


class CISPO(GroupRelative):
    """See the module's docstring."""

    Config = CISPOConfig
    config: CISPOConfig

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        columns = logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"]
        return clipped_importance(*columns, self.config.clip, self.config.clip_high)
