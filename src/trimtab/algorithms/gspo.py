"""Group sequence policy optimisation (Zheng et al. 2025): the clip looks at whole responses.

credit     as grpo
policy     -min(s A, clip(s, 1 - low, 1 + high) A),     s = (pi(y|x) / pi_old(y|x))^(1/|y|)
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.group import GroupConfig, GroupRelative
from trimtab.batch import Batch
from trimtab.maths.policy_losses import sequence_clip


class GSPOConfig(GroupConfig):
    """The settings of GSPO."""

    clip: float = Field(3e-4, gt=0, description="the length-normalised ratio is kept above 1 - clip")
    clip_high: float = Field(4e-4, gt=0, description="and below 1 + clip_high")


class GSPO(GroupRelative):
    """See the module's docstring."""

    Config = GSPOConfig
    config: GSPOConfig

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        columns = logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"], batch.mask, batch.response_of_token
        return sequence_clip(*columns, self.config.clip, self.config.clip_high)
