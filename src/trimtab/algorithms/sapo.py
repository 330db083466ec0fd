"""Soft adaptive policy optimisation (Gao et al. 2025): a smooth gate instead of a clip.

credit     as grpo
policy     -(4 / tau) sigma(tau (rho - 1)) A,     tau larger for negative advantages
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from trimtab.algorithms.group import GroupConfig, GroupRelative
from trimtab.batch import Batch
from trimtab.maths.policy_losses import soft_gate


class SAPOConfig(GroupConfig):
    """The settings of SAPO."""

    tau_positive: float = Field(1.0, gt=0, description="sharpness of the gate where the advantage is positive")
    tau_negative: float = Field(1.05, gt=0, description="sharpness of the gate where it is negative")


class SAPO(GroupRelative):
    """See the module's docstring."""

    Config = SAPOConfig
    config: SAPOConfig

    def surrogate(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor | None]:
        columns = logprobs, batch.tokens["logprobs_old"], batch.tokens["advantages"]
        return soft_gate(*columns, self.config.tau_positive, self.config.tau_negative), None
