"""The work a step cannot do without: floating-point operations and bytes, from lengths and shapes alone.

Counted: each prompt once for all of its responses, attention only where it looks back, the output head on response tokens only,
backward = 2 x forward; a reference pass and the passes of reward model and critic where the work has them. Not counted: padding,
prompts read again, recomputation, elementwise operations, the optimiser.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.data import Row
from bench.works import Work


@dataclass(frozen=True)
class Shape:
    """What of a model's configuration decides its cost."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocabulary: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Shape:
        width, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(
            config["num_hidden_layers"],
            width,
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or width // heads,
            config["intermediate_size"],
            config["vocab_size"],
        )

    @property
    def layer_weights(self) -> int:
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.width * self.inner

    @property
    def body_weights(self) -> int:
        """Weights of all matrix products but the output head's."""
        return self.layers * self.layer_weights

    @property
    def head_weights(self) -> int:
        return self.width * self.vocabulary

    def attention(self, looks: int) -> float:
        """Operations of all layers for `looks` pairs of (query, key it sees)."""
        return 4.0 * self.layers * self.heads * self.head_dim * looks


def looks(prompt: int, response: int) -> int:
    """Pairs of (response token, earlier token or itself)."""
    return response * prompt + response * (response + 1) // 2


def forward(shape: Shape, rows: list[Row], *, head: bool = True, last: bool = False) -> float:
    """Operations of one packed forward pass. head: logits of response tokens; last: each response's last token is read too."""
    total = 0.0
    for row in rows:
        prompt, lengths = len(row["prompt"]), [len(r) for r in row["responses"]]
        read = [n if last else n - 1 for n in lengths]
        total += 2.0 * shape.body_weights * (prompt + sum(read))
        total += shape.attention(looks(0, prompt) + sum(looks(prompt, n) for n in read))
        total += 2.0 * shape.head_weights * sum(lengths) if head else 0.0
    return total


def step(shape: Shape, work: Work, rows: list[Row]) -> float:
    """Operations of one step of a work. `rows` holds, for works that generate, responses of the length that is generated."""
    policy = forward(shape, rows)
    if work.kind == "reward":
        return 3 * forward(shape, rows, head=False, last=True)
    if work.kind in ("sft", "dpo"):
        return (3 + work.reference) * policy
    if work.kind == "decode":
        return policy
    scored = forward(shape, rows, head=False, last=True) if work.kind == "ppo" else 0.0
    return policy + scored + learning(shape, work, rows)


def learning(shape: Shape, work: Work, rows: list[Row]) -> float:
    """Operations of what follows sampling and scoring: the looks of reference, policy and critic, and the updates that begin with them."""
    policy, critic = forward(shape, rows), forward(shape, rows, head=False)
    return (3 + work.reference) * policy + (3 * critic if work.kind == "ppo" else 0.0)


def decode_bound(shape: Shape, rows: list[Row], *, gemm: float, bandwidth: float, element: int = 2) -> float:
    """The least seconds to generate the rows' responses side by side: the prompts at the GEMM ceiling, then step by step the longer

    of computing (at that ceiling) and of reading weights, and keys and values of prompt (once a group) and response.
    """
    prompts = [{"prompt": row["prompt"], "responses": []} for row in rows]
    seconds = forward(shape, prompts, head=False) / gemm
    count = sum(len(row["responses"]) for row in rows)
    keys = 2 * shape.layers * shape.kv_heads * shape.head_dim * element
    weights = (shape.body_weights + shape.head_weights) * element
    for t in range(max(len(r) for row in rows for r in row["responses"])):
        alive = [(len(row["prompt"]), sum(len(r) > t for r in row["responses"])) for row in rows]
        operations = sum(n for _, n in alive) * 2.0 * (shape.body_weights + shape.head_weights)
        operations += shape.attention(sum(n * (prompt + t) for prompt, n in alive))
        cached = keys * sum(prompt + n * t for prompt, n in alive if n)
        seconds += max(operations / gemm, (weights + cached) / bandwidth)
    assert count
    return seconds
