"""The words of the command line: what each is for, and where what it does lies. Nothing heavy is imported for it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from trimtab.algorithms import ALGORITHMS, PREFERENCES


@dataclass(frozen=True)
class Command:
    """One word of the command line. `config` and `run` are "module:name"; `what` goes into the list of commands."""

    what: str
    config: str
    run: str
    kind: str = "stage"  # stage: writes a run directory; action: does something and prints
    first: str = ""  # module:name of what turns a first word that is no recipe into settings
    named: bool = False  # config(name) gives the recipe's type, and run(name, ...) runs it: one stage for many algorithms


COMMANDS = {
    "sft": Command("fine-tune on demonstrations", "trimtab.stages.sft:SFTConfig", "trimtab.stages.sft:sft"),
    "reward": Command("train a reward model on comparisons", "trimtab.stages.reward:RewardModelConfig", "trimtab.stages.reward:reward"),
    **{
        name: Command(entry.what, "trimtab.stages.policy:policy_config", "trimtab.stages.policy:policy", named=True)
        for name, entry in ALGORITHMS.items()
    },
    **{
        name: Command(entry.what, "trimtab.stages.preference:preference_config", "trimtab.stages.preference:preference", named=True)
        for name, entry in PREFERENCES.items()
    },
    "rejection": Command(
        "fine-tune on the best of n own responses, in rounds",
        "trimtab.stages.rejection:RejectionConfig",
        "trimtab.stages.rejection:rejection",
    ),
    "evaluate": Command(
        "held-out reward, KL and win rate against another model",
        "trimtab.stages.evaluate:EvaluateConfig",
        "trimtab.stages.evaluate:evaluate",
    ),
    "audit": Command(
        "where a reward model is right, how sure it is, and whether length decides",
        "trimtab.stages.audit:AuditConfig",
        "trimtab.cli.tools:audit",
        "action",
    ),
    "implicit-reward": Command(
        "the reward a policy is optimal for, read from the policy",
        "trimtab.stages.implicit:ImplicitConfig",
        "trimtab.stages.implicit:implicit_reward",
        "action",
    ),
    "sample": Command(
        "sample responses, or keep the best of n", "trimtab.stages.sample:SampleConfig", "trimtab.cli.tools:sample", "action"
    ),
    "judge": Command(
        "compare samples with a language model as the judge", "trimtab.stages.judge:JudgeConfig", "trimtab.stages.judge:judge", "action"
    ),
    "serve-reward": Command(
        "serve a reward model or a function over HTTP: trimtab serve-reward FOLDER|file.py:name [key=value ...]",
        "trimtab.stages.serve:ServeConfig",
        "trimtab.stages.serve:serve",
        "action",
        first="trimtab.stages.serve:named",
    ),
    "annotate": Command(
        "compare samples with the simulated annotator", "trimtab.demo.annotate:AnnotateConfig", "trimtab.demo.annotate:annotate", "action"
    ),
    "merge": Command(
        "merge a LoRA adapter into its base model", "trimtab.models.merge:MergeConfig", "trimtab.models.merge:merge", "action"
    ),
    "demo": Command(
        "the whole story on a small model, in about seven minutes", "trimtab.demo.story:DemoConfig", "trimtab.demo.story:demo", "action"
    ),
}


class Tool(NamedTuple):
    """A word without a recipe: `run`, a "module:name", is given the words that follow."""

    what: str
    run: str


TOOLS = {
    "exact": Tool(
        "hold every algorithm against the exact optimum: trimtab exact [--algorithm A] [--quick] [--json] [--output FOLDER]",
        "trimtab.cli.tools:exact",
    ),
    "explain": Tool(
        "one step of a policy run, token by token: trimtab explain RUN STEP [--response N]",
        "trimtab.cli.tools:explain",
    ),
    "plan": Tool(
        "what a recipe needs, and whether it fits: trimtab plan COMMAND [recipe.yaml] [key=value ...]",
        "trimtab.cli.tools:plan",
    ),
    "resume": Tool(
        "go on with a run from its newest whole checkpoint: trimtab resume RUN [key=value ...] [--allow-changed]",
        "trimtab.cli.recipes:resume",
    ),
    "report": Tool(
        "rebuild RUN/report.html, or compare several runs: trimtab report RUN [RUN...] [--output FILE]",
        "trimtab.cli.tools:report",
    ),
    "schema": Tool(
        "print the JSON schema of a command's recipe: trimtab schema COMMAND",
        "trimtab.cli.tools:schema",
    ),
}


def config_of(name: str) -> Any:
    """The type of a command's recipe."""
    found = load(COMMANDS[name].config)
    return found(name) if COMMANDS[name].named else found


def load(place: str) -> Callable[..., Any]:
    """What lies at "module:name"."""
    module, _, attribute = place.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return loaded
