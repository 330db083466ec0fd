"""Cutting a response into pieces, and finding the tokens where the pieces end."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

from trimtab.data.templates import Template

SENTENCE = r"[.!?]+[\"')\]]*\s+"
"""What ends a sentence: its closing marks, the quotes and brackets after them, and white space."""


def cut_after(text: str, pattern: str) -> list[int]:
    """Where the pieces of a text end, in characters: behind every match of a pattern, and at the end of the text.

    A piece of white space alone is joined to its neighbour.
    """
    ends = [match.end() for match in re.finditer(pattern, text) if match.end() > match.start()]
    bounds = [0, *(end for end in ends if end < len(text)), len(text)]
    kept = [end for start, end in pairwise(bounds) if text[start:end].strip()]
    return [*kept[:-1], len(text)]


def cut_every(count: int, length: int) -> list[int]:
    """The last tokens of pieces of `length` tokens each; the last piece is shorter if they do not fit."""
    return [*range(length - 1, count - 1, length), count - 1]


def last_tokens(template: Template, tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """For pieces that end after so many characters of a response's text, the response token each ends with.

    That is the first token by which the piece is complete: where a token spans a border, it belongs to the piece before.
    """
    return [min(bisect_left(range(len(tokens)), end, key=lambda i: len(template.decode(tokens[: i + 1]))), len(tokens) - 1) for end in ends]
