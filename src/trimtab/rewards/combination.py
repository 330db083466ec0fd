"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from trimtab.protocols import Reward
from trimtab.types import Group, Score

Combination = Literal["mean", "sum", "min", "uncertainty"]


class CombinedReward:
    """The weighted rewards w_k r_k of several members as one; parts keep their own names.

    sum, mean; min (worst case); uncertainty: mean - uncertainty_weight x variance (Coste et al. 2023), with the standard
    deviation as the part "sd". In sums and means, what a member placed on tokens stays there; otherwise the total is one number.
    Where a member failed and nothing stands in for it, the whole has failed: its total is `failed`.
    """

    def __init__(
        self,
        members: Sequence[Reward],
        weights: Sequence[float],
        how: Combination = "sum",
        *,
        uncertainty_weight: float = 0.0,
        failed: float = math.nan,
    ) -> None:
        self.members, self.weights, self.how, self.uncertainty_weight = members, weights, how, uncertainty_weight
        self.name, self.failed = str(how), failed

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        tables = [member.score(groups) for member in self.members]
        return [
            [self._one([table[i][j] for table in tables], len(response.tokens)) for j, response in enumerate(group.responses)]
            for i, group in enumerate(groups)
        ]

    def _one(self, scores: list[Score], tokens: int) -> Score:
        weighted = [weight * score.total for weight, score in zip(self.weights, scores, strict=True)]
        parts = {name: value for score in scores for name, value in score.parts.items()}
        failure = next((score.failure for score in scores if score.failure is not None), None)
        if any(score.missing for score in scores):
            return Score(self.failed, parts, failure=failure)
        if self.how == "min":
            return Score(min(weighted), parts, failure=failure)
        mean = sum(weighted) / len(weighted)
        if self.how == "uncertainty":
            variance = sum((value - mean) ** 2 for value in weighted) / len(weighted)
            return Score(mean - self.uncertainty_weight * variance, {**parts, "sd": math.sqrt(variance)}, failure=failure)
        return Score(sum(weighted) if self.how == "sum" else mean, parts, self._placed(scores, tokens), failure)

    def _placed(self, scores: list[Score], tokens: int) -> tuple[tuple[int, float], ...]:
        """Every member's placed rewards, with its weight; a member that placed nothing counts at the last token."""
        if not any(score.placed for score in scores):
            return ()
        share = 1.0 if self.how == "sum" else 1 / len(scores)
        rewards: dict[int, float] = {}
        for weight, score in zip(self.weights, scores, strict=True):
            for token, value in score.placed or ((tokens - 1, score.total),):
                rewards[token] = rewards.get(token, 0.0) + share * weight * value
        return tuple(sorted(rewards.items()))
