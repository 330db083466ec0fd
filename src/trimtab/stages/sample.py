"""Sampling responses to prompts, and keeping the best of n by a reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from trimtab import rewards, seeds
from trimtab.config import Config
from trimtab.data.records import DataConfig, group_row, load_prompts, write_jsonl
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.protocols import Reward
from trimtab.rewards import RewardConfig
from trimtab.types import Group, Score


class SampleConfig(Config):
    """A recipe of `trimtab sample`."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    prompt: str | None = Field(None, description="one prompt, instead of data")
    data: DataConfig | None = Field(None, description="prompts from a file")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    n: int = Field(1, gt=0, description="responses per prompt; with a reward, the best of them is kept")
    reward: RewardConfig | None = Field(None, description="keep the response this scores highest")
    seed: int = Field(0, ge=0, description="decides every random draw")
    output: str | None = Field(None, description="write JSON lines here (prompt, responses, truncated) instead of printing")

    @model_validator(mode="after")
    def _prompts(self) -> SampleConfig:
        if (self.prompt is None) == (self.data is None):
            raise ValueError("set either prompt or data.path")
        return self


def sample(config: SampleConfig) -> list[Group]:
    """Sample, and write the result if `output` is set. Returns the groups."""
    model = LanguageModel.load(config.model, template=config.data.template if config.data else "auto", trainable=False)
    if config.data is not None:
        prompts = load_prompts(config.data, model.template).records
    else:
        assert config.prompt is not None
        prompts = [model.template.prompt(config.prompt)]
    engine = LocalEngine(model, config.sampling, config.engine)
    groups = engine.generate(prompts, config.n, seed=seeds.derive(config.seed, "sample"))
    if config.reward is not None:
        groups = best_of(groups, rewards.make(config.reward, device=config.model.device, policy=model.template))
    if config.output is not None:
        write_jsonl(Path(config.output), [group_row(group) for group in groups])
    return groups


def best_of(groups: Sequence[Group], reward: Reward) -> list[Group]:
    """Each group with only its highest-scoring response (the first of several equal ones)."""
    return [group.only(kept) for group, kept in zip(groups, select(groups, reward.score(groups)), strict=True)]


def select(groups: Sequence[Group], scores: Sequence[Sequence[Score]], keep: int = 1, threshold: float | None = None) -> list[list[int]]:
    """Of every group, the indices of its `keep` highest-scoring different responses, best first, the earlier of equal ones first.

    threshold: responses that score less are never kept; a group may then have none.
    """
    least = -math.inf if threshold is None else threshold
    return [
        [i for i in _different(group, row) if row[i].total >= least][:keep] for group, row in zip(groups, scores, strict=True)
    ]  # fmt: skip


def _different(group: Group, row: Sequence[Score]) -> list[int]:
    """Indices by falling score; of responses with the same tokens only the first."""
    first = {response.tokens: i for i, response in reversed(list(enumerate(group.responses)))}
    return sorted(first.values(), key=lambda i: (-row[i].total, i))
