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

PREFERENCES = {
    "dpo": Entry("direct preference optimisation; label_smoothing makes it conservative", "trimtab.algorithms.preferences.pairs:DPO"),
    "robust": Entry("DPO for labels flipped at a known rate", "trimtab.algorithms.preferences.pairs:Robust"),
    "ipo": Entry("draw the margin to a finite value (sums over tokens, as in the paper)", "trimtab.algorithms.preferences.pairs:IPO"),
    "ipo_mean": Entry("IPO on means per token", "trimtab.algorithms.preferences.pairs:MeanIPO"),
    "hinge": Entry("hinge on the margin (SLiC)", "trimtab.algorithms.preferences.pairs:Hinge"),
    "kto": Entry("desirable and undesirable responses, no pairs, against the KL", "trimtab.algorithms.preferences.labels:KTO"),
    "bco": Entry("a classifier of desirable and undesirable responses, no pairs", "trimtab.algorithms.preferences.labels:BCO"),
    "bco_pair": Entry("BCO on both responses of a pair", "trimtab.algorithms.preferences.pairs:BCOPair"),
    "orpo": Entry("fine-tuning with an odds ratio, no reference", "trimtab.algorithms.preferences.pairs:ORPO"),
    "simpo": Entry("mean log-probabilities with a margin, no reference", "trimtab.algorithms.preferences.pairs:SimPO"),
    "cpo": Entry("DPO without a reference, plus likelihood", "trimtab.algorithms.preferences.pairs:CPO"),
    "rpo": Entry("DPO plus a little likelihood of the chosen response", "trimtab.algorithms.preferences.pairs:RPO"),
    "exo": Entry("reverse KL from the policy's choice to the label", "trimtab.algorithms.preferences.pairs:EXO"),
    "nca": Entry("keeps the chosen response's probability up", "trimtab.algorithms.preferences.pairs:NCA"),
    "aot": Entry("margins above the reference's, as distributions", "trimtab.algorithms.preferences.rankings:AOT"),
    "aot_unpaired": Entry("desirable above undesirable responses, as distributions", "trimtab.algorithms.preferences.rankings:UnpairedAOT"),
    "apo_zero": Entry("chosen up, rejected down: data better than the policy", "trimtab.algorithms.preferences.pairs:APOZero"),
    "apo_down": Entry("both down, rejected further: data worse than the policy", "trimtab.algorithms.preferences.pairs:APODown"),
    "discopop": Entry("the loss found by search", "trimtab.algorithms.preferences.pairs:DiscoPOP"),
    "sppo": Entry("log-ratios towards fixed targets", "trimtab.algorithms.preferences.pairs:SPPO"),
    "f_dpo": Entry("DPO for another divergence than reverse KL", "trimtab.algorithms.preferences.pairs:FDPO"),
    "wpo": Entry("DPO with pairs weighted as the policy would sample them", "trimtab.algorithms.preferences.pairs:WPO"),
    "ld_dpo": Entry("DPO in which extra length counts less", "trimtab.algorithms.preferences.pairs:LDDPO"),
    "dpo_mean": Entry("length-normalised DPO", "trimtab.algorithms.preferences.pairs:MeanDPO"),
    "tr_dpo": Entry("DPO whose reference follows the policy", "trimtab.algorithms.preferences.pairs:TRDPO"),
    "plackett_luce": Entry("DPO for whole rankings", "trimtab.algorithms.preferences.rankings:PlackettLuce"),
    "mixture": Entry("several preference losses with weights", "trimtab.algorithms.preferences.mixture:Mixture"),
}
