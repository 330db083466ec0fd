"""Where the speed comes from: our side beside itself with one factor switched off, in turns. `python -m bench.ablate`.

A factor is one line of `SWITCHES`: what it is, on which work it shows, and how it is taken away: a change of the setting or of the work,
or a function that patches the product inside the worker process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bench.compare import Bench, Timed, machine, versions
from bench.link import Worker
from bench.works import TUNED_ALLOCATOR, WORKS, Setting, Work


@dataclass(frozen=True)
class Switch:
    """One factor.

    environment: of the worker without it, where it is one; work: what changes in the work; patch: called in the worker before it loads.
    """

    what: str
    works: tuple[str, ...]
    patch: Callable[[], None] | None = None
    work: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] | None = None


def repeat_prompts() -> None:
    """Every response is a group of its own: its prompt is read again."""
    from dataclasses import replace as with_changes

    from trimtab.models.packed import Layout

    whole = Layout.of

    def of(groups: Sequence[Any], **options: Any) -> Any:
        alone = [with_changes(g, responses=(r,)) for g in groups for r in g.responses]
        return whole([*alone, *(g for g in groups if not g.responses)], **options)

    Layout.of = staticmethod(of)  # type: ignore[method-assign, assignment]


def pad() -> None:
    """As many tokens more as padding every prompt and response of the micro-batch to the longest would add."""
    from trimtab.models.packed import Layout
    from trimtab.types import Group, Prompt

    whole = Layout.of

    def of(groups: Sequence[Any], **options: Any) -> Any:
        lengths = [len(r.tokens) for g in groups for r in g.responses]
        prompt, response = max(len(g.prompt.tokens) for g in groups), max(lengths, default=0)
        missing = [prompt - len(g.prompt.tokens) + sum(response - len(r.tokens) for r in g.responses) for g in groups]
        return whole([*groups, *(Group(Prompt((1,) * n, ""), ()) for n in missing if n)], **options)

    Layout.of = staticmethod(of)  # type: ignore[method-assign, assignment]


def head_everywhere() -> None:
    """Logits of all positions, though only those that predict a response token are used."""
    import torch

    from trimtab.models import language
    from trimtab.models.packed import Layout

    def predictors(self: Any, batch: Any) -> Any:
        layout = Layout.of(batch.groups, keep_last=False, device=self.device)
        states = self.hidden(layout.input_ids, layout.position_ids, layout)
        used = torch.zeros(len(states), dtype=torch.bool)
        used[layout.predictor] = True
        self.unused = states[~used]
        return states.index_select(0, layout.predictor), layout.targets

    selected = vars(language)["token_logprobs"]

    def logprobs(states: Any, head: Any, targets: Any, **options: Any) -> Any:
        unused = holder[-1].unused
        whole = torch.cat([states, unused]), head, torch.cat([targets, targets.new_zeros(len(unused))])
        found, entropy = selected(*whole, **options)
        return found[: len(targets)], None if entropy is None else entropy[: len(targets)]

    holder: list[Any] = []
    forward = language.LanguageModel.forward

    def forward_everywhere(self: Any, *args: Any, **options: Any) -> Any:
        holder.append(self)
        try:
            return forward(self, *args, **options)
        finally:
            holder.pop()

    language.LanguageModel.predictors = predictors  # type: ignore[method-assign]
    language.LanguageModel.forward = forward_everywhere  # type: ignore[method-assign]
    vars(language)["token_logprobs"] = logprobs


def whole_logits() -> None:
    """All logits of a micro-batch at once, written down and read in full precision."""
    from types import SimpleNamespace

    from trimtab.maths import logprobs

    logprobs.PART_BYTES = logprobs.SLICE_ELEMENTS = 2**62
    logprobs.products = SimpleNamespace(usable=lambda weight: False)  # type: ignore[assignment]
    logprobs.kernels = SimpleNamespace(serves=lambda x: False)  # type: ignore[assignment]


def part_by_part() -> None:
    """Every product, norm and gate of a layer is an operation of its own."""
    from trimtab.models import fused

    fused._parameters = lambda layer: None


def sdpa() -> None:
    """torch's scaled_dot_product_attention over the whole packed sequence, with a mask (and so layers part by part)."""
    import torch

    part_by_part()
    from trimtab.models.packed import Layout

    def attend(self: Any, layer: int, query: Any, key: Any, value: Any, settings: Any) -> Any:
        if not hasattr(self, "seen"):
            self.seen = mask_of(self)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=self.seen, scale=settings.scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)

    Layout.attend = attend  # type: ignore[method-assign]


def mask_of(layout: Any) -> Any:
    """Which position of a packed sequence sees which: [n, n]."""
    import torch

    n = len(layout.input_ids)
    seen = torch.zeros(n, n, dtype=torch.bool)
    for block in layout.plan.blocks:
        for g, places in enumerate(block.prompts):
            prompt = places[places >= 0]
            seen[prompt[:, None], prompt] = torch.ones(len(prompt), len(prompt), dtype=torch.bool).tril()
            for rows in (rows for part in block.parts for rows in part[g]):
                own = rows[rows >= 0]
                seen[own[:, None], prompt] = True
                seen[own[:, None], own] = torch.ones(len(own), len(own), dtype=torch.bool).tril()
    return seen


def full_precision() -> None:
    """Weights and arithmetic in float32."""
    import torch

    from trimtab.models import loading

    loading.resolve_dtype = lambda name, device: torch.float32  # type: ignore[assignment]


def products_of_torch() -> None:
    """The products of linear layers and of the head by torch, their gradients in bfloat16 first."""
    from trimtab.kernels import products

    products.usable = lambda weight: False


def masters() -> None:
    """A float32 copy of the weights, stepped by torch's fused AdamW, beside those in bfloat16."""
    from trimtab.kernels import adamw

    adamw.serves = lambda parameter: False


def look_apart() -> None:
    """The look at a rollout keeps nothing for the update that follows."""
    from trimtab.stages.actor_critic import PolicyOnly

    look = PolicyOnly.look
    PolicyOnly.look = lambda self, batch, *, ahead=False: look(self, batch)  # type: ignore[method-assign]


def give_memory_back() -> None:
    """The C library does as it does by itself."""
    from trimtab.models import loading

    loading.keep_freed_memory = lambda: None  # type: ignore[assignment]


PAIRS = ("dpo-precomputed", "dpo-long")
BOTH = ("dpo-precomputed", "grpo", "decode-transformers")
SWITCHES = {
    "shared prompt": Switch("the prompt is read once for all its responses", (*PAIRS, "grpo"), repeat_prompts),
    "no padding": Switch("only real tokens are computed", PAIRS, pad),
    "head on responses": Switch("logits only where a response token is predicted", PAIRS, head_everywhere),
    "logits in chunks": Switch("log-probabilities without a whole float32 array of logits", PAIRS, whole_logits),
    "attention of our own": Switch("only what a token may see, no scores kept; else SDPA with a mask", PAIRS, sdpa),
    "compiled kernels": Switch(
        "products, attention, norms, gates and rotary angles in C++, decoding in whole steps; else plain torch",
        BOTH,
        environment={**TUNED_ALLOCATOR, "TRIMTAB_KERNELS": "off"},
    ),
    "tiles": Switch(
        "products by the tile unit, where the processor has one; else by vectors",
        BOTH,
        environment={**TUNED_ALLOCATOR, "TRIMTAB_KERNELS": "avx512"},
    ),
    "layers as a whole": Switch("a layer is one operation with few calls, its sums added inside products", PAIRS, part_by_part),
    "matrix products of our own": Switch("linear layers and head by panels, gradients added up in float32", PAIRS, products_of_torch),
    "weights in halves": Switch("bfloat16 weights are the upper halves of their float32 values, one pass a step", PAIRS, masters),
    "look is the first pass": Switch("the look at a rollout is the first forward pass of its update", ("grpo",), look_apart),
    "bfloat16": Switch("weights and products in bfloat16, masters in float32", BOTH, full_precision),
    "memory is kept": Switch("the allocator keeps freed memory", PAIRS, give_memory_back, environment={}),
    "reference once": Switch("the reference's log-probabilities are kept", ("dpo-precomputed",), work={"reference": True}),
}
"""What it is when it is on, where it is measured, how it is taken away."""


def switch_off(names: Sequence[str]) -> None:
    """In a worker: take these factors away."""
    for name in names:
        patch = SWITCHES[name].patch
        if patch is not None:
            patch()


def ablated(bench: Bench, name: str, work: Work, n: int) -> dict[str, Any]:
    """What one factor is worth on one work: seconds without it over seconds with it, and the same of peak memory."""
    switch = SWITCHES[name]
    rows, _ = bench.prepare(work, n + 1)
    plain: tuple[Work, Setting] = (work, {})
    without: tuple[Work, Setting] = (replace(work, **switch.work), {"without": [name]})
    with bench.alone():
        sides: list[tuple[Worker, Timed]] = []
        try:
            for side, setting in (plain, without):
                worker, ready = bench.ours(
                    side, rows, setting, switch.environment if setting and switch.environment is not None else TUNED_ALLOCATOR
                )
                first = worker.ask("step")
                sides.append((worker, Timed.of(ready, first)))
            for i in range(n):
                for worker, timed in sides if i % 2 == 0 else reversed(sides):
                    timed.add(worker.ask("step"))
        finally:
            for worker, _ in sides:
                worker.close()
    (_, ours), (_, other) = sides
    ratios = [b / a for a, b in zip(ours.seconds, other.seconds, strict=True)]
    return {
        "factor": name,
        "what": switch.what,
        "work": work.name,
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "n": n,
        "memory_ratio": other.peak / ours.peak,
        "seconds": statistics.median(ours.seconds),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ablate", description=__doc__)
    parser.add_argument("--factor", nargs="+", choices=list(SWITCHES), default=list(SWITCHES))
    parser.add_argument("--work", nargs="+", help="only on these works")
    parser.add_argument("--model", help="another model")
    parser.add_argument("--steps", type=int, default=5, help="rounds")
    parser.add_argument("--lock", type=Path, help="a file locked during every measurement, on a machine that is shared")
    parser.add_argument("--output", type=Path, default=Path("bench/results/ablation.json"))
    options = parser.parse_args(arguments)
    bench = Bench(lambda text: print(text, flush=True), options.lock)
    found = {(r["factor"], r["work"]): r for r in json.loads(options.output.read_text())["rows"]} if options.output.exists() else {}
    for name in options.factor:
        for place in SWITCHES[name].works:
            if options.work and place not in options.work:
                continue
            work = WORKS[place] if options.model is None else replace(WORKS[place], model=options.model)
            row = ablated(bench, name, work, options.steps)
            found[name, place] = row
            spread = "-".join(f"{x:.2f}" for x in row["spread"])
            bench.say(f"{name} on {place}: {row['ratio']:.2f}x ({spread}), memory {row['memory_ratio']:.2f}x")
            options.output.parent.mkdir(parents=True, exist_ok=True)
            kept = {"rows": list(found.values()), "versions": versions(work), "machine": machine()}
            options.output.write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
