"""What policy algorithms share: the KL coefficient, and the per-token rewards it makes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field
from torch import Tensor

from trimtab.batch import Batch
from trimtab.config import Config
from trimtab.maths import kl


class KLConfig(Config):
    """The penalty beta * KL(pi || pi_ref), put into the reward per token and detached (unbiased; see maths.kl)."""

    beta: float = Field(0.05, ge=0, description="weight of the penalty; 0 optimises the reward alone")
    target: float | None = Field(None, gt=0, description="adapt beta so that KL per response (nats) comes near this; null keeps beta fixed")
    horizon: int = Field(10_000, gt=0, description="responses over which an adaptive beta can change by a factor of about e")


class KLPenalty:
    """The KL coefficient in force, fixed or adaptive."""

    def __init__(self, config: KLConfig) -> None:
        self.config, self.beta = config, config.beta

    def rewards(self, batch: Batch) -> Tensor:
        """Token rewards of a batch from its columns `reward`, `logprobs_old`, `logprobs_ref`."""
        log_ratio = kl.k1(batch.tokens["logprobs_old"], batch.tokens["logprobs_ref"])
        return kl.penalised_rewards(batch.responses["reward"], log_ratio, batch.last_token, self.beta)

    def adapt(self, batch: Batch) -> None:
        """After a step: move an adaptive beta towards its target."""
        if self.config.target is not None:
            per_response = batch.sum_by_response(kl.k1(batch.tokens["logprobs_old"], batch.tokens["logprobs_ref"]))
            measured = float(per_response.mean())
            self.beta = kl.adapted_beta(self.beta, measured, self.config.target, len(batch.lengths), self.config.horizon)

    def state_dict(self) -> dict[str, Any]:
        return {"beta": self.beta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.beta = float(state["beta"])
