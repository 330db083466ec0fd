"""Length and reward: a price for length, and a reward from which what length alone explains is taken away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.config import Config
from trimtab.protocols import Reward
from trimtab.types import Group, Response, Score

Unit = Literal["token", "character"]


class LengthConfig(Config):
    """A price for length, as a reward of its own; combine it with others through `members`."""

    per: Unit = Field("token", description="what length is counted in")
    weight: float = Field(0.01, gt=0, description="price of one unit")
    free: int = Field(0, ge=0, description="units that cost nothing")
    target: int | None = Field(None, ge=0, description="instead: every unit above or below this length costs")

    @model_validator(mode="after")
    def _one_price(self) -> LengthConfig:
        if self.free and self.target is not None:
            raise ValueError("set free or target, not both")
        return self


class LengthPenalty:
    """-weight max(0, |y| - free), or -weight ||y| - target|."""

    def __init__(self, config: LengthConfig, *, name: str = "length") -> None:
        self.config, self.name = config, name

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        return [[self._one(response) for response in group.responses] for group in groups]

    def _one(self, response: Response) -> Score:
        length, config = length_of(response, self.config.per), self.config
        off = max(0, length - config.free) if config.target is None else abs(length - config.target)
        return Score(-config.weight * off, {self.name: -config.weight * off})


class LengthDebiased:
    """Another reward without what a straight line in length explains of it:

        r'(y) = r(y) - b (|y| - mean |y|),      b = cov(|y|, r) / var(|y|)

    over all responses scored so far, those of the call first: within the first call, r' and length are exactly uncorrelated.
    The mean reward stays. What is taken away is a part NAME_by_length of the score. Length that is really worth something is taken
    away too; so is it where only the prompts differ in length and in reward. A score that failed is left as it is, and not counted.
    """

    def __init__(self, reward: Reward, per: Unit = "token") -> None:
        self.member, self.per = reward, per
        self.name: str = reward.name
        self.line = RunningLine()

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        raw = self.member.score(groups)
        lengths = [[float(length_of(response, self.per)) for response in group.responses] for group in groups]
        counted = [
            (length, score.total)
            for row, row_lengths in zip(raw, lengths, strict=True)
            for score, length in zip(row, row_lengths, strict=True)
            if score.failure is None
        ]
        self.line.observe(*torch.tensor(counted, dtype=torch.float64).reshape(-1, 2).unbind(1))
        return [
            [self._one(score, length) for score, length in zip(row, row_lengths, strict=True)]
            for row, row_lengths in zip(raw, lengths, strict=True)
        ]

    def _one(self, score: Score, length: float) -> Score:
        if score.failure is not None:
            return score
        explained = self.line.slope * (length - self.line.mean_x)
        placed = (*score.placed, (score.placed[-1][0], -explained)) if score.placed else ()  # length is known at the end
        return Score(score.total - explained, {**score.parts, f"{self.name}_by_length": explained}, placed)

    def state_dict(self) -> dict[str, Any]:
        """The running sums, as JSON values."""
        return vars(self.line).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in vars(self.line):
            setattr(self.line, name, float(state[name]))


class RunningLine:
    """Least squares of y on x over all that was observed, from running means and sums of products (Chan et al. 1983)."""

    def __init__(self) -> None:
        self.count, self.mean_x, self.mean_y, self.sum_xx, self.sum_xy = 0.0, 0.0, 0.0, 0.0, 0.0

    @property
    def slope(self) -> float:
        """sum (x - mean x)(y - mean y) / sum (x - mean x)^2; 0 while x has no spread."""
        return self.sum_xy / self.sum_xx if self.sum_xx > 0 else 0.0

    def observe(self, x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> None:
        """Add observations."""
        if len(x) == 0:
            return
        n, mean_x, mean_y = float(len(x)), float(x.mean()), float(y.mean())
        dx, dy, total = mean_x - self.mean_x, mean_y - self.mean_y, self.count + n
        between = self.count * n / total
        self.sum_xx += float((x - mean_x).square().sum()) + dx * dx * between
        self.sum_xy += float(((x - mean_x) * (y - mean_y)).sum()) + dx * dy * between
        self.mean_x += dx * n / total
        self.mean_y += dy * n / total
        self.count = total


def length_of(response: Response, per: Unit) -> int:
    """Tokens (EOS is one), or characters of the text."""
    return len(response.tokens) if per == "token" else len(response.text)
