"""Group relative policy optimisation (Shao et al. 2024), and the two that mend its normalisations.

credit     A = (r - mean) / sd over the responses to one prompt; the same for every token
policy     -min(rho A, clip(rho, 1 - low, 1 + high) A)

grpo       each response weighs the same (aggregation "sequence")
dr_grpo    no division by sd, none by length (Liu et al. 2025): G / (G - 1) A is RLOO's advantage
dapo       each token weighs the same, high > low, groups without a difference are sampled anew (Yu et al. 2025); its penalty for long
           responses is a reward: shaping.overlong

The papers of grpo put KL into the loss as a per-token k3, whose gradient is not the KL's; here it is in the reward, unless
algorithm.kl.place=loss algorithm.kl.estimator=k3 asks for theirs.
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.group import GroupConfig, GroupRelative
from trimtab.batch import Batch
from trimtab.maths.policy_losses import ppo_clip
from trimtab.maths.reductions import Aggregation


class GRPOConfig(GroupConfig):
    """The settings of GRPO."""

    clip: float = Field(0.2, gt=0, description="the ratio is kept above 1 - clip")
    clip_high: float | None = Field(None, gt=0, description="and below 1 + clip_high; null: clip")
    dual_clip: float | None = Field(None, gt=1, description="bound the loss of a negative advantage at this many times it; null: no bound")


class GRPO(GroupRelative):
    """See the module's docstring."""

    Config = GRPOConfig
    config: GRPOConfig

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        columns = logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"]
        return ppo_clip(*columns, self.config.clip, self.config.clip_high, self.config.dual_clip)


class DrGRPOConfig(GRPOConfig):
    """The settings of Dr. GRPO."""

    divide_by_deviation: bool = Field(False, description="divide by the group's standard deviation: weighs easy and hard prompts up")
    aggregation: Aggregation = Field("fixed-length", description="how per-token losses are averaged")


class DrGRPO(GRPO):
    """GRPO without its two normalisations."""

    Config = DrGRPOConfig


class DAPOConfig(GRPOConfig):
    """The settings of DAPO."""

    clip_high: float | None = Field(0.28, gt=0, description="the ratio is kept below 1 + clip_high; null: clip")
    aggregation: Aggregation = Field("token", description="how per-token losses are averaged")
    resample: int = Field(3, ge=0, description="rounds of further prompts in place of groups whose responses all scored alike")


class DAPO(GRPO):
    """GRPO with unequal clip bounds, token weights, and resampling of groups that teach nothing."""

    Config = DAPOConfig
