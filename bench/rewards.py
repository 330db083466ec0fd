"""The reward of the works that generate: cheap, and the same function on both sides."""

from __future__ import annotations

from typing import Any


def sevens(prompt: str, response: str, row: Any) -> float:
    """The share of sevens among a response's characters."""
    return response.count("7") / max(1, len(response))


def sevens_of_each(completions: list[str], **_: Any) -> list[float]:
    return [sevens("", completion, None) for completion in completions]
