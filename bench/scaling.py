"""How cost grows: time and peak memory of one update against response length, group size, vocabulary, depth and model size.

`python -m bench.scaling` writes bench/results/scaling.json and docs/scaling.png. Our side only: these are shapes, not ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import flops
from bench.compare import Bench, machine, peak_of, versions
from bench.link import ROOT
from bench.models import config_of
from bench.works import Setting, Work

OUTPUT, PICTURE = ROOT / "bench" / "results" / "scaling.json", ROOT / "docs" / "scaling.png"
STEPS = 3


@dataclass(frozen=True)
class Curve:
    """One panel: what varies, and the point at each value."""

    label: str
    values: tuple[int, ...]
    note: str

    def point(self, value: int) -> tuple[Work, Setting]:
        prompt, response, group, model, budget = 128, 64, 2, "135m", 8192
        if self.label == "response tokens":
            response = value
        elif self.label == "group size":
            prompt, group = 256, value
        elif self.label == "vocabulary":
            model = f"10m:vocab_size={value}"
        elif self.label.startswith("layers"):
            model = f"135m:num_hidden_layers={value}"
        elif self.label == "parameters (millions)":
            model = f"{value}m"
        name = f"scaling-{self.label.split()[0].strip(',')}-{value}"
        work = Work(name, "sft", "none", model=model, rows=2, prompt=(prompt, prompt), response=(response, response), responses=group)
        return work, {"budget": budget, "checkpointing": self.label == "layers, checkpointed"}


CURVES = {
    "response": Curve("response tokens", (32, 64, 128, 256, 512, 1024), "2 prompts of 128 tokens, 2 responses each, 135M"),
    "group": Curve("group size", (1, 2, 4, 8, 16, 32), "2 prompts of 256 tokens, responses of 64, 135M"),
    "vocabulary": Curve("vocabulary", (4096, 16384, 49152, 131072), "10M-parameter body, 2 prompts of 128 tokens, 2 responses of 64 each"),
    "depth": Curve("layers", (6, 12, 18, 24, 30), "135M shape, 2 prompts of 128 tokens, 2 responses of 64 each"),
    "depth-checkpointed": Curve("layers, checkpointed", (6, 12, 18, 24, 30), "the same, with activation checkpointing"),
    "size": Curve("parameters (millions)", (10, 135, 360), "2 prompts of 128 tokens, 2 responses of 64 each"),
}


def measured(bench: Bench, curve: Curve) -> Iterator[dict[str, Any]]:
    """The points of a curve: the middle of `STEPS` updates, the highest memory of one, and that above the loaded model."""
    for value in curve.values:
        work, setting = curve.point(value)
        rows, steps = bench.prepare(work, STEPS + 1)
        with bench.alone():
            worker, ready = bench.ours(work, rows, setting)
            with worker:
                worker.ask("step")
                replies = [worker.ask("step") for _ in range(STEPS)]
        seconds = [reply["seconds"] for reply in replies]
        peak = max(map(peak_of, replies))
        point = {
            "value": value,
            "seconds": statistics.median(seconds),
            "spread": [min(seconds), max(seconds)],
            "peak_bytes": peak,
            "above_model_bytes": peak - ready["loaded_bytes"],
            "necessary_operations": flops.step(flops.Shape.of(config_of(work.model)), work, steps[1]),
        }
        bench.say(f"{curve.label} {value}: {point['seconds']:.2f} s, {point['above_model_bytes'] / 1e9:.2f} GB above the model")
        yield point


def draw(curves: dict[str, dict[str, Any]], picture: Path) -> None:
    """One panel a curve, three in a row: seconds on the left, memory above the model on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    wide, high = min(3, len(curves)), -(-len(curves) // 3)
    figure, panels = pyplot.subplots(high, wide, figsize=(4.2 * wide, 3.2 * high), constrained_layout=True, squeeze=False)
    for spare in panels.flat[len(curves) :]:
        spare.set_axis_off()
    for panel, (label, curve) in zip(panels.flat, curves.items(), strict=False):
        x = [point["value"] for point in curve["points"]]
        panel.plot(x, [point["seconds"] for point in curve["points"]], "o-", color="tab:blue")
        panel.set_xlabel(label)
        panel.set_ylabel("seconds per update", color="tab:blue")
        panel.set_ylim(bottom=0)
        panel.set_xlim(left=0)
        memory = panel.twinx()
        memory.plot(x, [point["above_model_bytes"] / 1e9 for point in curve["points"]], "s--", color="tab:orange")
        memory.set_ylabel("GB above the model", color="tab:orange")
        memory.set_ylim(bottom=0)
        panel.set_title(curve["note"], fontsize=7)
    figure.savefig(picture, dpi=110)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--curve", nargs="+", choices=list(CURVES), default=list(CURVES))
    parser.add_argument("--lock", type=Path, help="a file locked during every measurement, on a machine that is shared")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    bench = Bench(lambda text: print(text, flush=True), options.lock)
    curves = json.loads(options.output.read_text())["curves"] if options.output.exists() else {}
    for name in options.curve:
        curve = CURVES[name]
        curves[curve.label] = {"note": curve.note, "steps": STEPS, "points": list(measured(bench, curve))}
        work, _ = curve.point(curve.values[0])
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"curves": curves, "versions": versions(work), "machine": machine()}, indent=1) + "\n")
    draw(curves, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
