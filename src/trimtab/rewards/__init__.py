"""Where scores come from: a Python function, a trained reward model, a rule, or several combined. `make` builds one from a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.data.templates import Mode, Template
from trimtab.errors import ConfigError
from trimtab.models.loading import ModelConfig
from trimtab.protocols import Reward
from trimtab.rewards.length import LengthConfig, LengthDebiased, LengthPenalty
from trimtab.rewards.segments import SegmentsConfig
from trimtab.rewards.verifier import VerifierConfig, make_verifier


class RewardConfig(Config):
    """One reward: exactly one of `model`, `function`, `verifier`, `length` and `members` is set."""

    name: str | None = Field(None, description="its name in metrics and samples; by default the folder's or function's")
    model: str | None = Field(None, description="folder of a trained reward model (its own tokenizer is used)")
    function: str | None = Field(None, description="a Python function, 'file.py:name' or 'package.module:name'")
    batched: bool = Field(False, description="the function takes lists (prompts, responses, rows) and returns a list of scores")
    workers: int = Field(
        1, gt=0, description="calls of the function at the same time, for one that waits (for a judge over the network); it must bear that"
    )
    verifier: VerifierConfig | None = Field(None, description="a rule: is the response right?")
    length: LengthConfig | None = Field(None, description="a price for length")
    length_debias: Literal["token", "character"] | None = Field(
        None, description="subtract from this reward what its running linear regression on the responses' length explains"
    )
    members: list[RewardConfig] | None = Field(None, description="several rewards, combined")
    combine: Literal["mean", "sum", "min", "uncertainty"] = Field(
        "sum", description="how members are combined, after their weights; uncertainty: mean - uncertainty_weight x variance"
    )
    weight: float = Field(1.0, description="factor on this reward inside a combination")
    ensemble: Literal["mean", "weighted", "min", "uncertainty"] = Field(
        "mean", description="how the heads of one model are combined; uncertainty: mean - uncertainty_weight x variance"
    )
    ensemble_weights: list[float] | None = Field(None, description="ensemble=weighted: one factor per head, before the mean")
    uncertainty_weight: float = Field(0.1, ge=0, description="factor on the variance between heads or members")
    segments: SegmentsConfig | None = Field(None, description="give the reward piece by piece, each where the piece ends")
    template: Mode = Field("auto", description="how a reward model is shown the conversation; auto: as it was trained")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field("auto", description="precision of a reward model")
    tokens_per_batch: int = Field(8192, gt=0, description="packed tokens a reward model reads at once")

    @model_validator(mode="after")
    def _one_source(self) -> RewardConfig:
        given = [name for name in ("model", "function", "verifier", "length", "members") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"set one of model, function, verifier, length, members, not {' and '.join(given)}")
        if self.members is not None and not self.members:
            raise ValueError("members is empty; list at least one reward")
        if (self.ensemble_weights is None) == (self.ensemble == "weighted"):
            raise ValueError("ensemble=weighted and ensemble_weights go together")
        return self


class State:
    """What a reward has gathered (running statistics), and all the rewards it is made of."""

    def __init__(self, reward: Reward) -> None:
        self.reward = reward

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self._parts())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for i, part in enumerate(self._parts()):
            part.load_state_dict(state[str(i)])

    def _parts(self) -> Iterator[Any]:
        """The rewards with a state, in the order in which they are nested."""
        waiting: list[Any] = [self.reward]
        while waiting:
            reward = waiting.pop(0)
            if hasattr(reward, "state_dict"):
                yield reward
            waiting = [*getattr(reward, "members", ()), *([reward.member] if hasattr(reward, "member") else []), *waiting]


def make(config: RewardConfig, *, where: str = "reward", device: str = "auto", policy: Template | None = None) -> Reward:
    """Build the reward a recipe asks for, for the responses of a policy with this template. Raises ConfigError with the fix."""
    if config.length_debias is not None:
        biased = make(config.model_copy(update={"length_debias": None}), where=where, device=device, policy=policy)
        return LengthDebiased(biased, config.length_debias)
    if config.segments is not None:
        return _segmented(config, config.segments, where=where, device=device, policy=policy)
    options: dict[str, Any] = {} if config.name is None else {"name": config.name}
    if config.function is not None:
        from trimtab.rewards.function import FunctionReward, load_function

        return FunctionReward(
            load_function(config.function, where=f"{where}.function"), batched=config.batched, workers=config.workers, **options
        )
    if config.model is not None:
        from trimtab.rewards.model import ModelReward

        model = ModelConfig(path=config.model, dtype=config.dtype, device=device)
        return ModelReward.load(
            model, template=config.template, token_budget=config.tokens_per_batch, policy=policy, reading=config.ensemble,
            weights=config.ensemble_weights, uncertainty_weight=config.uncertainty_weight, **options,
        )  # fmt: skip
    if config.length is not None:
        return LengthPenalty(config.length, **options)
    if config.verifier is not None:
        return make_verifier(config.verifier, name=config.name, where=f"{where}.verifier")
    if config.members is not None:
        from trimtab.rewards.combination import CombinedReward

        members = [make(member, where=f"{where}.members.{i}", device=device, policy=policy) for i, member in enumerate(config.members)]
        weights = [member.weight for member in config.members]
        return CombinedReward(members, weights, config.combine, uncertainty_weight=config.uncertainty_weight)
    raise ConfigError("no reward is set", where=where, fix=f"set {where}.model=FOLDER or {where}.function=file.py:name")


def _segmented(config: RewardConfig, segments: SegmentsConfig, *, where: str, device: str, policy: Template | None) -> Reward:
    from trimtab.rewards.segments import ProcessReward, SegmentedReward

    if policy is None:
        raise ConfigError("segments need the tokenizer of the policy", where=f"{where}.segments", fix=f"leave {where}.segments out")
    if segments.score in ("difference", "alone"):
        return SegmentedReward(
            make(config.model_copy(update={"segments": None}), where=where, device=device, policy=policy), policy, segments
        )
    if config.model is None:
        raise ConfigError(f"segments.score={segments.score} needs a model", where=f"{where}.segments", fix=f"set {where}.model=FOLDER")
    model = ModelConfig(path=config.model, dtype=config.dtype, device=device)
    return ProcessReward.load(model, policy, segments, template=config.template, name=config.name, token_budget=config.tokens_per_batch)
