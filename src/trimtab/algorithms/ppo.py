"""Proximal policy optimisation (Schulman et al. 2017) as it is used on language models (Ouyang et al. 2022).

sample     y ~ pi_old(. | x)
reward     r_t = -beta (log pi_old - log pi_ref)(y_t) + 1[t = T] r(x, y)
credit     A = GAE(r, V_old), R = A + V_old, A whitened over the whole batch
policy     -min(rho A, clip(rho, 1 - e, 1 + e) A) - c_H H,     rho = pi / pi_old
critic     max((V - R)^2, (clip(V, V_old +- e_v) - R)^2) / 2
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.base import PolicyGradient, PolicyGradientConfig
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.maths.advantages import gae, moments
from trimtab.maths.policy_losses import ppo_clip
from trimtab.maths.reductions import to_column, to_rows
from trimtab.maths.value_losses import clipped_squared_error


class PPOConfig(PolicyGradientConfig):
    """The settings of PPO."""

    epochs: int = Field(2, gt=0, description="passes over every rollout batch")
    clip: float = Field(0.2, gt=0, description="the ratio is kept within [1 - clip, 1 + clip]")
    dual_clip: float | None = Field(None, gt=1, description="bound the loss of a negative advantage at this many times it; null: no bound")
    value_clip: float | None = Field(0.2, gt=0, description="the value may move this far from its rollout value; null: no clipping")
    gae_lambda: float = Field(0.95, ge=0, le=1, description="0: TD error; 1: Monte-Carlo return minus value")
    whiten_advantages: bool = Field(True, description="mean 0 and standard deviation 1 over all response tokens of the rollout batch")


class PPO(PolicyGradient):
    """See the module's docstring."""

    Config = PPOConfig
    config: PPOConfig
    uses_critic = True

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        assert values is not None
        rows = gae(to_rows(rewards, batch.lengths), to_rows(values, batch.lengths), self.config.discount, self.config.gae_lambda)
        return to_column(rows, batch.lengths)

    def scale(self, batch: Batch, raw: Tensor) -> tuple[Tensor, Tensor]:
        return moments(raw, batch.mask) if self.config.whiten_advantages else super().scale(batch, raw)

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        clip = self.config.clip
        return ppo_clip(logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"], clip, dual_clip=self.config.dual_clip)

    def value_loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        if self.config.value_clip is None:
            return super().value_loss(outputs, batch, counts)
        assert outputs.values is not None
        old, returns = batch.tokens["values_old"], batch.tokens["returns"]
        terms = clipped_squared_error(outputs.values, old, returns, self.config.value_clip)
        return Loss((terms * batch.mask).sum() / max(1, counts.tokens))
