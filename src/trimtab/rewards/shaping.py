"""From raw scores to the reward an algorithm sees: running normalisation, clipping, and a penalty for missing EOS."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from trimtab.config import Config


class ShapingConfig(Config):
    """Applied in this order: normalise, clip, penalty for great length, penalty for a missing EOS."""

    normalise: bool = Field(False, description="subtract the running mean of all scores so far and divide by their standard deviation")
    clip: float | None = Field(None, gt=0, description="keep the reward within [-clip, clip]")
    overlong: int | None = Field(
        None, gt=0, description="the last tokens before sampling.max_tokens over which a penalty rises linearly from 0 to 1 (DAPO)"
    )
    missing_eos_penalty: float | None = Field(None, ge=0, description="subtract this from the reward of a response that was cut off")


class RewardShaping:
    """Running mean and variance over all scores of a run (Chan et al.'s parallel update), and the shaped rewards."""

    def __init__(self, config: ShapingConfig, max_tokens: int) -> None:
        self.config, self.max_tokens = config, max_tokens
        self.count, self.mean, self.sum_squares = 0.0, 0.0, 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of the scores seen so far (biased); 1 until there is any spread."""
        return math.sqrt(self.sum_squares / self.count) if self.count and self.sum_squares > 0 else 1.0

    def __call__(
        self, scores: Float[Tensor, " responses"], lengths: Int[Tensor, " responses"], truncated: Bool[Tensor, " responses"]
    ) -> Float[Tensor, " responses"]:
        """Shape one step's scores; the statistics include this step first."""
        shaped = scores
        if self.config.normalise:
            self._observe(scores)
            shaped = (shaped - self.mean) / (self.deviation + 1e-8)
        if self.config.clip is not None:
            shaped = shaped.clamp(-self.config.clip, self.config.clip)
        if self.config.overlong is not None:
            shaped = shaped - ((lengths - self.max_tokens) / self.config.overlong + 1).clamp(0, 1)
        if self.config.missing_eos_penalty is not None:
            shaped = torch.where(truncated, shaped - self.config.missing_eos_penalty, shaped)
        return shaped

    def _observe(self, scores: Tensor) -> None:
        n, mean = float(len(scores)), float(scores.double().mean())
        delta, total = mean - self.mean, self.count + n
        self.sum_squares += float((scores.double() - mean).square().sum()) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "sum_squares": self.sum_squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count, self.mean, self.sum_squares = float(state["count"]), float(state["mean"]), float(state["sum_squares"])
