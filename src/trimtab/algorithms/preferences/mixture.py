"""Several preference losses at once, with weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from trimtab.algorithms import PREFERENCES
from trimtab.algorithms.base import ReferenceConfig
from trimtab.algorithms.preferences.base import (
    PreferenceLoss,
    reference_field,
)
from trimtab.algorithms.preferences.labels import NLL
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.config import Config, validate
from trimtab.errors import ConfigError


class MixtureConfig(Config):
    """Settings of a weighted sum of losses. The default is MPO's (Wang et al. 2024)."""

    members: dict[str, float] = Field(
        default_factory=lambda: {"dpo": 0.8, "bco_pair": 0.2, "nll": 1.0},
        description="weight of each loss; nll is the likelihood of the chosen response; metrics are those of the first other loss",
    )
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="settings of the members, for example {dpo: {beta: 0.2}}; the others have their defaults"
    )
    reference: ReferenceConfig = reference_field(ReferenceConfig)

    @field_validator("members")
    @classmethod
    def _known(cls, members: dict[str, float]) -> dict[str, float]:
        known = [*(name for name in PREFERENCES if name != "mixture"), "nll"]
        unknown = [name for name in members if name not in known]
        if unknown or not members or any(weight <= 0 for weight in members.values()):
            what = f"names the unknown loss {unknown[0]!r}" if unknown else "needs at least one loss, with weights above 0"
            raise ValueError(f"{what}; losses are {', '.join(known)}")
        return members

    @model_validator(mode="after")
    def _settings_of_members(self) -> MixtureConfig:
        stray = sorted(self.settings.keys() - self.members.keys())
        if stray:
            raise ValueError(f"settings are given for {stray[0]!r}, which is no member")
        return self


class Mixture(PreferenceLoss):
    """A weighted sum of preference losses on the same data."""

    Config = MixtureConfig

    def __init__(self, config: MixtureConfig, name: str) -> None:
        super().__init__(config, name)
        self.members = {member: _member(member, config) for member in config.members}
        self.lead = next((member for member in self.members if member != "nll"), "nll")
        self.data = "pairs" if any(m.data == "pairs" for m in self.members.values()) else "labels"
        self.needs_own = any(m.needs_own for m in self.members.values())
        self.needs_mismatched = any(m.needs_mismatched for m in self.members.values())
        if all(m.reference.role == "none" for m in self.members.values()):
            self.reference = ReferenceConfig(role="none")

    def prepare(self, batch: Batch, mismatched: Batch | None = None, *, training: bool = True) -> Batch:
        for member in self.members.values():
            batch = member.prepare(batch, mismatched, training=training)
        return batch

    def loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        parts = {name: member.loss(outputs, batch, counts) for name, member in self.members.items()}
        value = torch.stack([self.config.members[name] * part.value for name, part in parts.items()]).sum()
        means = {key: x for part in parts.values() for key, x in part.means.items() if key.startswith("loss/")}
        return Loss(value, {**means, **parts[self.lead].means, f"loss/{self.name}": value})

    def correct(self, logprobs: Tensor, batch: Batch) -> Tensor:
        return self.members[self.lead].correct(logprobs, batch)

    def state_dict(self) -> dict[str, Any]:
        return {name: member.state_dict() for name, member in self.members.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, member in self.members.items():
            member.load_state_dict(state[name])


def _member(name: str, mixture: MixtureConfig) -> PreferenceLoss:
    """A member with its own settings; what follows the reference follows that of the mixture."""
    kind = NLL if name == "nll" else PREFERENCES[name].load()
    config = validate(kind.Config, mixture.settings.get(name, {}), source=f"algorithm.settings.{name}")
    if config.reference.role in ("synced", "ema"):
        raise ConfigError(
            f"{name} moves the reference", where="algorithm.members", fix="take dpo instead, and set algorithm.reference of the mixture"
        )
    if config.reference.role == "frozen":
        config = config.model_copy(update={"reference": mixture.reference})
    member: PreferenceLoss = kind(config, name)
    return member
