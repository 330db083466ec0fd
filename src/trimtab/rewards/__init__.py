"""Where scores come from: a Python function, a trained reward model, a rule, a server, or several. `make` builds one from a recipe."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.data.templates import Mode, Template
from trimtab.errors import ConfigError
from trimtab.models.loading import ModelConfig
from trimtab.protocols import Reward
from trimtab.rewards.isolation import FailureLimit, Isolated
from trimtab.rewards.length import LengthConfig, LengthDebiased, LengthPenalty
from trimtab.rewards.segments import SegmentedReward, SegmentsConfig
from trimtab.rewards.verifier import VerifierConfig, make_verifier


class RewardConfig(Config):
    """One reward: exactly one of `model`, `function`, `verifier`, `length`, `url` and `members` is set."""

    name: str | None = Field(None, description="its name in metrics and samples; by default the folder's or function's")
    model: str | None = Field(None, description="folder of a trained reward model (its own tokenizer is used)")
    function: str | None = Field(None, description="a Python function, 'file.py:name' or 'package.module:name'")
    batched: bool = Field(False, description="the function takes lists (prompts, responses, rows) and returns a list of scores")
    workers: int = Field(
        1,
        gt=0,
        description="calls of the function, or requests to the url, at the same time: for what waits (for a judge over the network); "
        "the function must bear that",
    )
    url: str | None = Field(None, description="a reward server, http:// or https://; it is asked by POST url/score")
    token_env: str | None = Field(None, description="of url: name of the environment variable that holds the server's bearer token")
    per_request: int = Field(8, gt=0, description="of url: samples sent at once")
    patience: float = Field(
        60.0, ge=0, description="of url: seconds to wait for a server that cannot be reached, before its samples have failed"
    )
    break_after: int = Field(5, gt=0, description="of url: failures in a row after which one request at a time tries, and the others wait")
    timeout: float | None = Field(
        None, gt=0, description="of function and url: seconds for one sample (a common call has so many for each); null: none, of url 60"
    )
    retries: int = Field(0, ge=0, description="times that a sample is tried again on which the reward failed")
    on_failure: Literal["stop", "exclude", "value"] = Field(
        "stop", description="where the reward fails on a sample: stop the run, leave the response out, or give it failure_value"
    )
    failure_value: float = Field(0.0, description="on_failure=value: the score of a response on which the reward failed")
    max_failures: float = Field(
        0.2, ge=0, le=1, description="stop the run when more than this share of the responses scored together (a step's) failed"
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
        given = [name for name in ("model", "function", "verifier", "length", "url", "members") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"set one of model, function, verifier, length, url, members, not {' and '.join(given)}")
        if self.members is not None and not self.members:
            raise ValueError("members is empty; list at least one reward")
        if (self.ensemble_weights is None) == (self.ensemble == "weighted"):
            raise ValueError("ensemble=weighted and ensemble_weights go together")
        return self

    @model_validator(mode="after")
    def _limits_can_be_held(self) -> RewardConfig:
        if self.timeout is not None and self.function is None and self.url is None:
            raise ValueError("timeout is of function and url; a verifier has seconds of its own, and members are given theirs each")
        if self.token_env is not None and self.url is None:
            raise ValueError("token_env goes with url")
        if self.url is not None:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("url begins with http:// or https:// and names a host")
            if parts.username is not None or parts.query or parts.fragment:
                raise ValueError("url is an address alone: a token goes into the environment variable named by token_env")
        return self

    @property
    def stands_in(self) -> float:
        """The total of what has failed: a value, or NaN (to be left out)."""
        return self.failure_value if self.on_failure == "value" else math.nan

    @property
    def tolerates(self) -> bool:
        """Whether it, or a member of it, may fail without an end of the run."""
        return self.on_failure != "stop" or any(member.tolerates for member in self.members or ())

    @property
    def excludes(self) -> bool:
        """Whether responses may be left without a score."""
        if self.on_failure == "stop":
            return any(member.excludes for member in self.members or ())
        return self.on_failure == "exclude"


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


def make(
    config: RewardConfig,
    *,
    where: str = "reward",
    device: str = "auto",
    policy: Template | None = None,
    excludes: bool = False,
    seed: int = 0,
) -> Reward:
    """Build the reward a recipe asks for, for the responses of a policy with this template. Raises ConfigError with the fix.

    excludes: the caller leaves out responses without a score (`isolation.scored`). seed: of the waits between requests.
    """
    if config.excludes and not excludes:
        fix = f"set {where}.on_failure=value and {where}.failure_value, or {where}.on_failure=stop"
        raise ConfigError("this command cannot leave responses out", where=f"{where}.on_failure", fix=fix)
    reward = _make(config, where=where, device=device, policy=policy, seed=seed)
    return FailureLimit(reward, config.max_failures) if config.tolerates else reward


def bare(reward: Reward) -> Reward:
    """A reward without what deals with its failures."""
    while isinstance(reward, FailureLimit | Isolated):
        reward = reward.member
    return reward


def _make(config: RewardConfig, *, where: str, device: str, policy: Template | None, seed: int) -> Reward:
    """The reward, its failures dealt with where they arise; what is made of others passes them on."""
    common: dict[str, Any] = {"device": device, "policy": policy, "seed": seed}
    if config.length_debias is not None:
        biased = _make(config.model_copy(update={"length_debias": None}), where=where, **common)
        return LengthDebiased(biased, config.length_debias)
    if config.segments is not None and policy is None:
        raise ConfigError("segments need the tokenizer of the policy", where=f"{where}.segments", fix=f"leave {where}.segments out")
    if config.segments is not None and policy is not None and config.segments.score in ("difference", "alone"):
        return SegmentedReward(
            _make(_passing_on(config, config).model_copy(update={"segments": None}), where=where, **common),
            policy, config.segments, failed=config.stands_in,
        )  # fmt: skip
    if config.members is not None:
        from trimtab.rewards.combination import CombinedReward

        members = [_make(_passing_on(member, config), where=f"{where}.members.{i}", **common) for i, member in enumerate(config.members)]
        weights = [member.weight for member in config.members]
        return CombinedReward(
            members, weights, config.combine, uncertainty_weight=config.uncertainty_weight, failed=config.stands_in
        )  # fmt: skip
    reward = _source(config, where=where, **common)
    if not config.tolerates and config.timeout is None and not config.retries and config.url is None:
        return reward
    together = config.batched or (config.function is None and config.verifier is None)
    return Isolated(
        reward,
        together=together,
        workers=1 if together or config.function is None else config.workers,
        timeout=config.timeout if config.url is None else None,
        retries=config.retries if config.url is None else 0,  # a request has its own
        failed=config.stands_in if config.tolerates else None,
    )


def _passing_on(part: RewardConfig, whole: RewardConfig) -> RewardConfig:
    """A part of a reward whose failures the whole deals with, unless the part says what is to be done itself."""
    kept = whole.on_failure == "stop" or (part is not whole and part.on_failure != "stop")
    return part.model_copy(update={"on_failure": part.on_failure if kept else "exclude", "retries": part.retries or whole.retries})


def _source(config: RewardConfig, *, where: str, device: str, policy: Template | None, seed: int) -> Reward:
    """The one thing that scores."""
    options: dict[str, Any] = {} if config.name is None else {"name": config.name}
    if config.segments is not None and config.model is None:
        how = config.segments.score
        raise ConfigError(f"segments.score={how} needs a model", where=f"{where}.segments", fix=f"set {where}.model=FOLDER")
    if config.function is not None:
        from trimtab.rewards.function import FunctionReward, load_function

        alone = config.timeout is not None or config.tolerates or config.retries > 0  # then calls at once are the wrapper's
        return FunctionReward(
            load_function(config.function, where=f"{where}.function"), batched=config.batched,
            workers=1 if alone else config.workers, tolerant=config.tolerates or config.retries > 0, **options,
        )  # fmt: skip
    if config.model is not None:
        model = ModelConfig(path=config.model, dtype=config.dtype, device=device)
        if config.segments is not None and policy is not None:
            from trimtab.rewards.segments import ProcessReward

            return ProcessReward.load(
                model, policy, config.segments, template=config.template, name=config.name, token_budget=config.tokens_per_batch
            )
        from trimtab.rewards.model import ModelReward

        return ModelReward.load(
            model, template=config.template, token_budget=config.tokens_per_batch, policy=policy, reading=config.ensemble,
            weights=config.ensemble_weights, uncertainty_weight=config.uncertainty_weight, **options,
        )  # fmt: skip
    if config.length is not None:
        return LengthPenalty(config.length, **options)
    if config.verifier is not None:
        return make_verifier(config.verifier, name=config.name, where=f"{where}.verifier")
    if config.url is not None:
        return _remote(config, config.url, where=where, seed=seed, **options)
    raise ConfigError("no reward is set", where=where, fix=f"set {where}.model=FOLDER or {where}.function=file.py:name")


def _remote(config: RewardConfig, url: str, *, where: str, seed: int, **options: Any) -> Reward:
    from trimtab.rewards.remote import RemoteReward

    token = os.environ.get(config.token_env) if config.token_env else None
    if config.token_env and not token:
        fix = f"export {config.token_env}=..., as the server was given it"
        raise ConfigError(f"the environment variable {config.token_env} is not set", where=f"{where}.token_env", fix=fix)
    return RemoteReward(
        url, token=token, workers=config.workers, per_request=config.per_request, timeout=config.timeout or 60.0, retries=config.retries,
        patience=config.patience, break_after=config.break_after, seed=seed, **options,
    )  # fmt: skip
