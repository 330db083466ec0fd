"""Where scores come from: a Python function, a trained reward model, a rule, or several combined. `make` builds one from a recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.data.templates import Mode, Template
from trimtab.errors import ConfigError
from trimtab.models.loading import ModelConfig
from trimtab.protocols import Reward
from trimtab.rewards.length import LengthConfig, LengthDebiased, LengthPenalty
from trimtab.rewards.verifier import VerifierConfig, make_verifier


class RewardConfig(Config):
    """One reward: exactly one of `model`, `function`, `verifier`, `length` and `members` is set."""

    name: str | None = Field(None, description="its name in metrics and samples; by default the folder's or function's")
    model: str | None = Field(None, description="folder of a trained reward model (its own tokenizer is used)")
    function: str | None = Field(None, description="a Python function, 'file.py:name' or 'package.module:name'")
    batched: bool = Field(False, description="the function takes lists (prompts, responses, rows) and returns a list of scores")
    verifier: VerifierConfig | None = Field(None, description="a rule: is the response right?")
    length: LengthConfig | None = Field(None, description="a price for length")
    length_debias: Literal["token", "character"] | None = Field(
        None, description="subtract from this reward what its running linear regression on the responses' length explains"
    )
    members: list[RewardConfig] | None = Field(None, description="several rewards, combined")
    combine: Literal["mean", "sum", "min"] = Field("sum", description="how members are combined, after their weights")
    weight: float = Field(1.0, description="factor on this reward inside a combination")
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
        return self


def make(config: RewardConfig, *, where: str = "reward", device: str = "auto", policy: Template | None = None) -> Reward:
    """Build the reward a recipe asks for, for the responses of a policy with this template. Raises ConfigError with the fix."""
    if config.length_debias is not None:
        biased = make(config.model_copy(update={"length_debias": None}), where=where, device=device, policy=policy)
        return LengthDebiased(biased, config.length_debias)
    options: dict[str, Any] = {} if config.name is None else {"name": config.name}
    if config.function is not None:
        from trimtab.rewards.function import FunctionReward, load_function

        return FunctionReward(load_function(config.function, where=f"{where}.function"), batched=config.batched, **options)
    if config.model is not None:
        from trimtab.rewards.model import ModelReward

        model = ModelConfig(path=config.model, dtype=config.dtype, device=device)
        return ModelReward.load(model, template=config.template, token_budget=config.tokens_per_batch, policy=policy, **options)
    if config.length is not None:
        return LengthPenalty(config.length, **options)
    if config.verifier is not None:
        return make_verifier(config.verifier, name=config.name, where=f"{where}.verifier")
    if config.members is not None:
        from trimtab.rewards.combination import CombinedReward

        members = [make(member, where=f"{where}.members.{i}", device=device, policy=policy) for i, member in enumerate(config.members)]
        return CombinedReward(members, [member.weight for member in config.members], config.combine)
    raise ConfigError("no reward is set", where=where, fix=f"set {where}.model=FOLDER or {where}.function=file.py:name")
