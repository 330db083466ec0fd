"""The same comparison on one GPU: random-weight Llama shapes of 1B to 8B in bf16, against TRL there. `python -m bench.gpu`.

`--self-check` runs every row on the CPU with a tiny model: it shows that the script runs, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.compare import BUILD, Bench, Missing
from bench.link import ROOT, WorkerError
from bench.table import table
from bench.works import WORKS, Setting, Work

SIZES = ("1b", "3b", "8b")
START: dict[str, Setting] = {
    "sft": {"micro": 8, "allocator": "default", "checkpointing": False, "sorted": False, "weights": "bfloat16", "layout": "padded"},
    "dpo": {"micro": 4, "allocator": "default", "checkpointing": False, "sorted": False, "weights": "bfloat16"},
    "grpo": {"micro": 8, "allocator": "default", "checkpointing": False, "weights": "bfloat16", "cache": None},
}
"""bfloat16 weights: at 8B, float32 weights, gradients and Adam's moments alone would fill the card."""

AXES = (("micro", (2, 4, 8, 16)), ("checkpointing", (False, True)), ("sorted", (False, True)))


def works(sizes: tuple[str, ...]) -> list[Work]:
    """SFT, DPO and GRPO at each size, with batches that fill a large card."""
    changes: dict[str, dict[str, Any]] = {
        "sft": {"rows": 32, "prompt": (100, 600), "response": (50, 600)},
        "dpo": {"rows": 16, "prompt": (100, 600), "response": (50, 600)},
        "grpo": {"rows": 4, "prompt": (100, 600), "response": (256, 256), "new": 256},
    }
    return [
        replace(WORKS[name], name=f"{name}-{size}", model=size, start=START[name], axes=AXES[: 3 if name != "grpo" else 2], **change)
        for size in sizes
        for name, change in changes.items()
    ]


def small(work: Work) -> Work:
    """The same row for the self-check."""
    start = {**work.start, "micro": 2}
    short: dict[str, Any] = {"rows": 2, "prompt": (8, 16), "response": (4, 8), "model": "tiny", "start": start}
    return replace(work, name=f"{work.kind}-check", **short, new=8 if work.generates else 0, responses=min(work.responses, 4))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--self-check", action="store_true", help="run it on the CPU with a tiny model")
    parser.add_argument("--size", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--search", action="store_true", help="look for the peer's fastest setting first")
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results" / "gpu")
    options = parser.parse_args(arguments)
    if options.self_check:
        options.size, options.steps, options.output = ["1b"], min(options.steps, 2), BUILD / "gpu-check"
    elif not _has_gpu():
        print("no GPU here: `python -m bench.gpu --self-check` runs the same rows on the CPU with a tiny model", file=sys.stderr)
        return 1
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(lambda text: print(text, flush=True), device="cpu" if options.self_check else "cuda")
    rows = []
    for work in works(tuple(options.size)):
        work = small(work) if options.self_check else work
        bench.say(f"{work.name} against {work.peer}")
        try:
            setting = bench.search(work)["setting"] if options.search else work.start
            row = bench.compare(work, setting, options.steps, 0)
        except (Missing, WorkerError) as error:
            row = {"work": work.name, "peer": work.peer, "failed": str(error).strip().splitlines()[-1][:300]}
        (options.output / f"{work.name}.json").write_text(json.dumps(row, indent=1) + "\n")
        rows.append(row)
    print("\n" + table(rows))
    return 1 if any("failed" in row for row in rows) else 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
