"""Advantage actor-critic (Mnih et al. 2016) on language models.

credit     A_t = sum_{k < n} gamma^k r_{t+k} + gamma^n V(s_{t+n}) - V(s_t);  n = 1 is the TD error r_t + gamma V(s_{t+1}) - V(s_t)
policy     -rho A   (at rho = 1 the gradient of -A log pi)
critic     (V - R)^2 / 2,  R = A + V_old

The critic learns with the policy (critic.trunk=shared: one backward pass) or beside it (critic.trunk=own: critic.updates steps each).
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.base import PolicyGradient, PolicyGradientConfig
from trimtab.batch import Batch
from trimtab.maths.advantages import n_step
from trimtab.maths.reductions import to_column, to_rows


class A2CConfig(PolicyGradientConfig):
    """The settings of A2C."""

    n_step: int | None = Field(None, gt=0, description="rewards before the critic's word is taken: 1 is the TD error; null: to the end")


class A2C(PolicyGradient):
    """See the module's docstring."""

    Config = A2CConfig
    config: A2CConfig
    uses_critic = True

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        assert values is not None
        steps = self.config.n_step or max(batch.lengths)
        return to_column(
            n_step(to_rows(rewards, batch.lengths), to_rows(values, batch.lengths), self.config.discount, steps), batch.lengths
        )
