"""Groups laid side by side in small padded blocks, for attention by batched matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

Span = tuple[int, int, list[tuple[int, int]]]
"""A group in the packed sequence: where its prompt begins, its length, and the same of every response."""


@dataclass(frozen=True)
class Block:
    """g groups: places in the packed sequence of P prompt tokens, and of parts of S responses x R tokens; -1 is padding."""

    prompts: Int[Tensor, "g P"]
    parts: tuple[Int[Tensor, "g S R"], ...]


def blocks_of(spans: list[Span], device: torch.device | str) -> list[Block]:
    """All groups, in blocks of similar ones."""
    return [_block(part, device) for part in _alike(spans)]


def _alike(spans: list[Span]) -> list[list[Span]]:
    """Groups of similar size, whose padded attention does little more work than the real one.

    Work is counted in attention scores. A block of its own costs some fifty small operations a layer, worth about 2^15 scores.
    """
    parts: list[list[Span]] = []
    real, shape = 0, (0, 0, 0)
    for start, length, answers in sorted(spans, key=lambda span: (span[1], max((n for _, n in span[2]), default=0))):
        longest = max((n for _, n in answers), default=0)
        work = length * length + sum(n * (length + n) for _, n in answers)
        grown = (max(shape[0], length), max(shape[1], len(answers)), max(shape[2], longest))
        if parts:
            padded = (len(parts[-1]) + 1) * (grown[0] ** 2 + grown[1] * grown[2] * (grown[0] + grown[2]))
        if not parts or padded > 1.1 * (real + work) + 2**15:
            parts.append([])
            real, grown = 0, (length, len(answers), longest)
        parts[-1].append((start, length, answers))
        real, shape = real + work, grown
    return parts


def _block(spans: list[Span], device: torch.device | str) -> Block:
    """Groups side by side, and their responses, longest first, in parts of similar length."""
    width = max(length for _, length, _ in spans)
    prompts = torch.tensor([_row(start, length, width) for start, length, _ in spans], device=device).view(len(spans), width)
    sorted_answers = [sorted(answers, key=lambda answer: -answer[1]) for _, _, answers in spans]
    count = max(len(answers) for answers in sorted_answers)
    rows = [[*answers, *[(0, 0)] * (count - len(answers))] for answers in sorted_answers]
    longest = [max(n for _, n in column) for column in zip(*rows, strict=True)]
    parts, first = [], 0
    for i in range(1, count + 1):
        shorter = i < count and longest[i] < 0.75 * longest[first] and len(spans) * (longest[first] - longest[i]) > 32
        if i == count or shorter:
            R = longest[first]
            places = [[_row(*answer, R) for answer in row[first:i]] for row in rows]
            parts.append(torch.tensor(places, device=device).view(len(spans), i - first, R))
            first = i
    return Block(prompts, tuple(part for part in parts if part.numel()))


def _row(first: int, count: int, width: int) -> list[int]:
    """`count` places from `first` on, and -1 for padding."""
    return [*range(first, first + count), *[-1] * (width - count)]
