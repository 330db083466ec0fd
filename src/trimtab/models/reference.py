"""Reference policies: the anchor of the KL penalty and of log-ratios. None ever receives a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from trimtab import interrupt
from trimtab.batch import Batch, Outputs
from trimtab.maths.logprobs import Head
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig


class Schedule(Protocol):
    """How a reference moves: the settings `role`, `decay` and `every` of a recipe."""

    @property
    def role(self) -> Literal["frozen", "synced", "ema", "none"]: ...

    @property
    def decay(self) -> float: ...

    @property
    def every(self) -> int: ...


class Reference:
    """A policy that is only read. This one stays where it is; `model` is the model that is run."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    def forward(self, batch: Batch, *, temperature: float = 1.0) -> Outputs:
        """Log-probabilities of every response token."""
        with torch.no_grad(), self.in_place():
            return self.model.forward(batch, temperature=temperature)

    def predictors(self, batch: Batch) -> tuple[Tensor, Head]:
        """The hidden states that predict every response token, and the head that reads them."""
        with torch.no_grad(), self.in_place():
            return self.model.predictors(batch)[0], self.model.head.detached()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """While this lasts, `model` is the reference."""
        yield

    def follow(self, how: Schedule, taken: int) -> None:
        """Move as the settings say, after `taken` steps of the policy."""


class AdapterOff(Reference):
    """With LoRA the policy's own model without its adapter is the policy as it started: a reference at no memory."""

    @contextmanager
    def in_place(self) -> Iterator[None]:
        with self.model.without_adapter():
            yield


class MovingReference(Reference):
    """Weights w, at first the policy's, put in their place for a forward pass; moved by w <- decay w + (1 - decay) policy.

    Only what is trained is kept, so that with an adapter it costs next to nothing. The copy is in float32 (float64 if the
    model is), where small moves are not lost.
    """

    def __init__(self, policy: LanguageModel) -> None:
        super().__init__(policy)
        self.weights = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self._parameters()}

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Come nearer the policy as it is now; a decay of 0 copies it."""
        interrupt.commit()
        for name, parameter in self._parameters():
            self.weights[name].lerp_(parameter.to(self.weights[name].dtype), 1 - decay)

    def follow(self, how: Schedule, taken: int) -> None:
        if how.role == "ema":
            self.move(how.decay)
        elif how.role == "synced" and taken % how.every == 0:
            self.move(0.0)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(state["weights"][name])

    def write(self, folder: Path) -> None:
        """Into an empty folder, as a model."""
        with self.in_place():
            self.model.write(folder)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        own = {name: parameter.data for name, parameter in self._parameters()}
        try:
            for name, parameter in self._parameters():
                parameter.data = self.weights[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._parameters():
                parameter.data = own[name]

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.model.trainable().items())


def make_reference(policy: LanguageModel, model: ModelConfig, how: Schedule, *, samples: bool = False) -> Reference | None:
    """The reference of a policy run. `samples`: it also draws the responses, so it must be able to stand in the policy's place."""
    if how.role == "none":
        return None
    return frozen_reference(policy, model) if how.role == "frozen" and not samples else MovingReference(policy)


def frozen_reference(policy: LanguageModel, model: ModelConfig) -> Reference:
    """The policy as it is at the start of a run."""
    return Reference(LanguageModel.load(model, trainable=False)) if model.lora is None else AdapterOff(policy)
