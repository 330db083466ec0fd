"""Several rewards as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from trimtab.protocols import Reward
from trimtab.types import Group, Score


class CombinedReward:
    """The weighted sum or mean of several rewards, or the smallest of them (worst case); parts keep their own names."""

    def __init__(self, members: Sequence[Reward], weights: Sequence[float], how: Literal["mean", "sum", "min"] = "sum") -> None:
        self.members, self.weights, self.how = members, weights, how
        self.name: str = how

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        tables = [member.score(groups) for member in self.members]
        return [
            [self._one([table[i][j] for table in tables]) for j in range(len(group.responses))] for i, group in enumerate(groups)
        ]  # fmt: skip

    def _one(self, scores: list[Score]) -> Score:
        weighted = [weight * score.total for weight, score in zip(self.weights, scores, strict=True)]
        total = {"sum": sum(weighted), "mean": sum(weighted) / len(weighted), "min": min(weighted)}[self.how]
        return Score(total, {name: value for score in scores for name, value in score.parts.items()})
