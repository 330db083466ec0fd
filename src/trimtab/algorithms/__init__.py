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
    "a2c": Entry("advantage actor-critic: TD-error or n-step advantages", "trimtab.algorithms.a2c:A2C"),
    "reinforce": Entry("policy gradient with a baseline", "trimtab.algorithms.reinforce:REINFORCE"),
    "rloo": Entry("REINFORCE with a leave-one-out baseline", "trimtab.algorithms.reinforce:RLOO"),
    "grpo": Entry("group relative advantages, clipped ratio", "trimtab.algorithms.grpo:GRPO"),
    "dr_grpo": Entry("GRPO without its length and deviation biases", "trimtab.algorithms.grpo:DrGRPO"),
    "dapo": Entry("GRPO with unequal clipping and resampling", "trimtab.algorithms.grpo:DAPO"),
    "gspo": Entry("GRPO with the ratio of whole sequences", "trimtab.algorithms.gspo:GSPO"),
    "reinforce_pp": Entry("REINFORCE++: globally normalised, clipped, no critic", "trimtab.algorithms.reinforce_pp:REINFORCEPP"),
    "remax": Entry("REINFORCE with the greedy response as baseline", "trimtab.algorithms.remax:ReMax"),
    "cispo": Entry("clipped importance weights, no token left out", "trimtab.algorithms.cispo:CISPO"),
    "gmpo": Entry("geometric mean of clipped ratios", "trimtab.algorithms.gmpo:GMPO"),
    "sapo": Entry("a soft gate in place of the clip", "trimtab.algorithms.sapo:SAPO"),
}
