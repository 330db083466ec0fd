"""Policy algorithms and preference losses by name. Adding one: a class beside these, and a line here.

Naming them imports none of them.
"""

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

_LOSSES = {
    "dpo": ("direct preference optimisation; label_smoothing makes it conservative", "DPO"),
    "robust": ("DPO for labels flipped at a known rate", "Robust"),
    "ipo": ("draw the margin to a finite value (sums over tokens, as in the paper)", "IPO"),
    "ipo_mean": ("IPO on means per token", "MeanIPO"),
    "hinge": ("hinge on the margin (SLiC)", "Hinge"),
    "kto": ("desirable and undesirable responses, no pairs, against the KL", "KTO"),
    "bco": ("a classifier of desirable and undesirable responses, no pairs", "BCO"),
    "bco_pair": ("BCO on both responses of a pair", "BCOPair"),
    "orpo": ("fine-tuning with an odds ratio, no reference", "ORPO"),
    "simpo": ("mean log-probabilities with a margin, no reference", "SimPO"),
    "cpo": ("DPO without a reference, plus likelihood", "CPO"),
    "rpo": ("DPO plus a little likelihood of the chosen response", "RPO"),
    "exo": ("reverse KL from the policy's choice to the label", "EXO"),
    "nca": ("keeps the chosen response's probability up", "NCA"),
    "aot": ("margins above the reference's, as distributions", "AOT"),
    "aot_unpaired": ("desirable above undesirable responses, as distributions", "UnpairedAOT"),
    "apo_zero": ("chosen up, rejected down: data better than the policy", "APOZero"),
    "apo_down": ("both down, rejected further: data worse than the policy", "APODown"),
    "discopop": ("the loss found by search", "DiscoPOP"),
    "sppo": ("log-ratios towards fixed targets", "SPPO"),
    "f_dpo": ("DPO for another divergence than reverse KL", "FDPO"),
    "wpo": ("DPO with pairs weighted as the policy would sample them", "WPO"),
    "ld_dpo": ("DPO in which extra length counts less", "LDDPO"),
    "dpo_mean": ("length-normalised DPO", "MeanDPO"),
    "tr_dpo": ("DPO whose reference follows the policy", "TRDPO"),
    "plackett_luce": ("DPO for whole rankings", "PlackettLuce"),
    "mixture": ("several preference losses with weights", "Mixture"),
}
PREFERENCES = {name: Entry(what, f"trimtab.algorithms.preferences:{kind}") for name, (what, kind) in _LOSSES.items()}
