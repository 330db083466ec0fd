"""A reference policy that follows the policy: a kept copy of its trainable weights, put in their place for a forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trimtab.batch import Batch, Outputs
from trimtab.models.language import LanguageModel


class MovingReference:
    """Weights w, at first the policy's, moved by w <- decay w + (1 - decay) policy. decay 0 copies the policy.

    Only what is trained is kept, so that with an adapter it costs next to nothing. The copy is in float32 (float64 if the
    model is), where small moves are not lost.
    """

    def __init__(self, policy: LanguageModel) -> None:
        self.policy = policy
        self.weights = {name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for name, p in self._parameters()}

    def forward(self, batch: Batch) -> Outputs:
        """What the reference says of a batch, without gradient."""
        with torch.no_grad(), self._in_place():
            return self.policy.forward(batch)

    @torch.no_grad()
    def move(self, decay: float) -> None:
        """Come nearer the policy as it is now."""
        for name, parameter in self._parameters():
            self.weights[name].lerp_(parameter.to(self.weights[name].dtype), 1 - decay)

    def save(self, folder: Path) -> Path:
        """Save as a model."""
        with self._in_place():
            return self.policy.save(folder)

    def _parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return list(self.policy.trainable().items())

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        own = {name: parameter.data for name, parameter in self._parameters()}
        try:
            for name, parameter in self._parameters():
                parameter.data = self.weights[name].to(parameter.dtype)
            yield
        finally:
            for name, parameter in self._parameters():
                parameter.data = own[name]
