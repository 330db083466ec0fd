"""The rows both sides read: token sequences with stated lengths, seeded, in one JSON file.

Token ids are drawn at random: what a step costs depends on how many there are, not on which. (Losses are then those of noise, which
is what makes the check of equal work sharp: every token counts.)
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from bench.works import Work

FIRST_TOKEN = 100
"""Ids below are special tokens in most vocabularies."""

EOS, PAD, UNKNOWN = 16, 0, 1
"""The ending token is one that no model here ever samples, so that all sampled responses are equally long on all sides."""

Row = dict[str, Any]


def rows_of(work: Work, steps: int, vocabulary: int, seed: int = 0) -> list[Row]:
    """`steps` x `work.rows` rows: {"prompt": ids, "responses": [ids ending in EOS, ...]}."""
    draw = random.Random(f"{work.prompt}{work.response}{seed}")

    def tokens(count: int) -> list[int]:
        return [draw.randrange(FIRST_TOKEN, vocabulary) for _ in range(count)]

    return [
        {
            "prompt": tokens(length(draw, work.prompt)),
            "responses": [[*tokens(length(draw, work.response) - 1), EOS] for _ in range(work.responses)],
        }
        for _ in range(steps * work.rows)
    ]


def length(draw: random.Random, span: tuple[int, int]) -> int:
    """Log-uniform between both ends."""
    low, high = span
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def write_rows(file: Path, work: Work, steps: int, vocabulary: int) -> list[Row]:
    """Make the rows of a run and write them for the workers."""
    rows = rows_of(work, steps, vocabulary)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(rows))
    return rows


def read_rows(file: str) -> list[Row]:
    rows: list[Row] = json.loads(Path(file).read_text())
    return rows


def in_steps(rows: list[Row], per_step: int) -> list[list[Row]]:
    return [rows[i : i + per_step] for i in range(0, len(rows), per_step)]


def as_text(ids: list[int]) -> str:
    """Ids in the words of the benchmark's tokenizer, which gives exactly these ids back."""
    return " ".join({EOS: "<eos>", PAD: "<pad>", UNKNOWN: "<unk>"}.get(i, f"t{i}") for i in ids)


def packed_tokens(rows: list[Row]) -> int:
    """Tokens of a packed forward pass: every prompt once."""
    return sum(len(row["prompt"]) + sum(map(len, row["responses"])) for row in rows)


def plain_tokens(rows: list[Row]) -> int:
    """Real tokens of the (prompt, response) sequences: the prompt once for each response."""
    return sum(len(row["prompt"]) + len(response) for row in rows for response in row["responses"])
