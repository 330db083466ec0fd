"""Runs of every kind, small enough to be ended and resumed many times, and what must not differ afterwards."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import tiny

REWARD = "def letters(prompt, response, row):\n    return float(sum(c in 'aeiou' for c in response))\n"
WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight")

SUPERVISED = ("fit.steps=5", "fit.batch_size=3", "fit.eval_every=2", "data.holdout=0.3", "optim.lr=1e-2", "fit.micro_batch_tokens=60")
ROLLOUT = (
    "data.path=prompts.jsonl", "sampling.max_tokens=6", "steps=5", "prompts_per_step=3", "responses_per_prompt=2", "optim.lr=1e-2",
    "samples_every=2", "micro_batch_tokens=60", "explain_prompts=1",
)  # fmt: skip
LETTERS = "reward.function=reward.py:letters"

KINDS: dict[str, tuple[str, ...]] = {
    "sft": ("sft", "data.path=sft.jsonl", *SUPERVISED),
    "sft in bfloat16": ("sft", "data.path=sft.jsonl", *SUPERVISED, "model.dtype=bfloat16"),
    "sft with an adapter": ("sft", "data.path=sft.jsonl", *SUPERVISED, "model.lora={rank: 2}"),
    "reward": ("reward", "data.path=pairs.jsonl", *SUPERVISED, "normalise.path=sft.jsonl"),
    "reward, an ensemble": ("reward", "data.path=pairs.jsonl", *SUPERVISED, "ensemble.members=2"),
    "dpo": ("dpo", "data.path=pairs.jsonl", *SUPERVISED),
    "bco": ("bco", "data.path=pairs.jsonl", *SUPERVISED),
    "dpo, reference moving": ("dpo", "data.path=pairs.jsonl", *SUPERVISED, "algorithm.reference={role: ema, decay: 0.5}"),
    "ppo": ("ppo", *ROLLOUT, LETTERS, "algorithm.epochs=2", "algorithm.minibatches=2", "algorithm.kl.target=0.1"),
    "ppo, critic of its own": ("ppo", *ROLLOUT, LETTERS, "critic.trunk=own", "critic.warmup_steps=2", "shaping.normalise=true"),
    "ppo in bfloat16": ("ppo", *ROLLOUT, LETTERS, "model.dtype=bfloat16"),
    "a2c": ("a2c", *ROLLOUT, LETTERS),
    "reinforce": ("reinforce", *ROLLOUT, LETTERS),
    "rloo": ("rloo", *ROLLOUT, LETTERS, "reference={role: synced, every: 2}"),
    "grpo": ("grpo", *ROLLOUT, LETTERS, "reward.length_debias=token"),
    "grpo, overlapping": ("grpo", *ROLLOUT, LETTERS, "overlap=true", "algorithm.mismatch.kind=truncate"),
    "grpo, reusing": ("grpo", *ROLLOUT, LETTERS, "engine.reuse=true"),
    "dapo": ("dapo", *ROLLOUT, LETTERS),
    "remax": ("remax", *ROLLOUT, LETTERS, "shaping.normalise=true"),
    "rejection": ("rejection", "data.path=prompts.jsonl", "sampling.max_tokens=6", "rounds=4", "n=2", LETTERS, "optim.lr=1e-2"),
}  # fmt: skip


def prepare(place: Path) -> None:
    """Model, data and reward for all of them."""
    tiny.folder(place / "model")
    rows = {
        "prompts": [{"prompt": f"say {word}"} for word in WORDS],
        "sft": [{"prompt": f"{word}:", "completion": word[::-1]} for word in WORDS],
        "pairs": [{"prompt": f"{word}?", "chosen": f"yes {word}", "rejected": f"no {word[:2]}"} for word in WORDS],
    }
    for name, records in rows.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    (place / "reward.py").write_text(REWARD)


def command(kind: str, output: str, *more: str) -> list[str]:
    """The words of the command line that start such a run."""
    name, *words = KINDS[kind]
    dtype = [] if any(word.startswith("model.dtype") for word in words) else ["model.dtype=float32"]
    return [name, "model.path=model", *dtype, *words, f"output={output}", *more]


def outcome(run: Path) -> dict[str, Any]:
    """All that a run has made, without what measures time: it must be the same however often the run was ended and resumed."""

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (run / name).read_text().splitlines()]

    timeless = [{name: value for name, value in row.items() if not name.startswith("time/")} for row in lines("metrics.jsonl")]
    last = (run / "checkpoints" / "last").resolve()
    files = {str(path.relative_to(last)): hashlib.sha256(path.read_bytes()).hexdigest() for path in last.rglob("*") if path.is_file()}
    explained = {path.name: path.read_text() for path in sorted(run.glob("steps/*"))}
    return {"metrics": timeless, "samples": lines("samples.jsonl"), "checkpoint": last.name, "files": files, "explained": explained}
