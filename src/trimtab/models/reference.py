"""The reference policy: the anchor of the KL penalty, which never receives a gradient."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.batch import Batch, Outputs
from trimtab.config import Config
from trimtab.maths.logprobs import Head
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig

Role = Literal["frozen", "ema", "synced", "none"]


class ReferenceConfig(Config):
    """Which policy the KL penalty is measured to."""

    role: Role = Field(
        "frozen",
        description="frozen: the policy as it starts; ema: a moving average of the policy; synced: the policy of `every` steps ago; "
        "none: no reference (kl.beta must be 0)",
    )
    decay: float = Field(0.99, ge=0, lt=1, description="role=ema: weight of the old average at each step")
    every: int = Field(64, gt=0, description="role=synced: steps between copies of the policy")


class Reference:
    """A policy that is only read. With LoRA and role=frozen it is the policy's own model with its adapter off: no memory."""

    def __init__(self, policy: LanguageModel, model: ModelConfig, config: ReferenceConfig, *, own_copy: bool = False) -> None:
        self.config, self.policy = config, policy
        moves = config.role in ("ema", "synced")
        self.adapter_off = model.lora is not None and not moves and not own_copy
        self.model = policy if self.adapter_off else LanguageModel.load(model, trainable=moves and model.lora is not None)
        self.model_parameters = {} if self.adapter_off else {n: p.requires_grad_(False) for n, p in self.model.model.named_parameters()}
        self.averages: dict[str, Tensor] = {}  # float32, so that small steps of a bfloat16 policy are not lost

    def forward(self, batch: Batch, *, temperature: float = 1.0) -> Outputs:
        """Log-probabilities, without gradient."""
        with torch.no_grad(), self._adapter():
            return self.model.forward(batch, temperature=temperature)

    def predictors(self, batch: Batch) -> tuple[Tensor, Head]:
        """The hidden states that predict every response token, and the head that reads them."""
        with torch.no_grad(), self._adapter():
            return self.model.predictors(batch)[0], self.model.head

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After step `step` (from 0): move as the role says."""
        if self.config.role == "synced" and (step + 1) % self.config.every == 0:
            for name, source in self._sources():
                self.model_parameters[name].copy_(source)
        elif self.config.role == "ema":
            for name, source in self._sources():
                average = self.averages.setdefault(
                    name, self.model_parameters[name].detach().to(torch.promote_types(source.dtype, torch.float32)).clone()
                )
                average.lerp_(source.to(average.dtype), 1 - self.config.decay)
                self.model_parameters[name].copy_(average)

    def _sources(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.policy.model.named_parameters() if p.requires_grad]

    def _adapter(self) -> AbstractContextManager[None]:
        return self.policy.without_adapter() if self.adapter_off else nullcontext()
