"""Policy algorithms by name. Adding one: a file beside these, and a line here. Naming them imports none of them."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A line of a registry: what it is in a few words, and where its class is ("module:Class")."""

    what: str
    place: str

    def load(self) -> Any:
        """The class; its `Config` holds its settings."""
        module, _, name = self.place.partition(":")
        return getattr(importlib.import_module(module), name)


ALGORITHMS = {
    "ppo": Entry("proximal policy optimisation: clipped ratio, learned value", "trimtab.algorithms.ppo:PPO"),
}
