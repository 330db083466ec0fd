"""Policy learning: sample, score, assign credit, update. max E[r(x, y)] - beta KL(pi || pi_ref), from the start's parameters.

One loop for every algorithm; what differs between them is in `algorithms/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, create_model, model_validator

from trimtab import rewards, seeds
from trimtab.algorithms import ALGORITHMS
from trimtab.batch import Batch, Outputs, observe
from trimtab.data.cursor import Cursor
from trimtab.data.records import DataConfig, load_prompts
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.errors import ConfigError
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.models.reference import make_reference
from trimtab.models.scorer import Scorer
from trimtab.protocols import Algorithm, Reward, Tracker
from trimtab.rewards import RewardConfig
from trimtab.rewards.model import ModelReward
from trimtab.rewards.shaping import RewardShaping, ShapingConfig
from trimtab.stages.actor_critic import ActorCritic, CriticConfig, OwnCritic, Passes, PolicyOnly, SharedTrunk
from trimtab.stages.common import StageConfig, save_checkpoint
from trimtab.stages.policy_metrics import Clock, describe, merged, sample_rows
from trimtab.training.optimiser import OptimConfig
from trimtab.types import Group, Score


class PolicyConfig(StageConfig):
    """A recipe of policy learning; `algorithm` holds the settings of the algorithm that the command names."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="the policy; as it is at the start, it is the reference too")
    data: DataConfig = Field(description="prompts")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="what scores a response")
    shaping: ShapingConfig = Field(default_factory=ShapingConfig, description="what is done to the scores")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    critic: CriticConfig = Field(default_factory=CriticConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-6))
    steps: int = Field(100, gt=0, description="rollout batches")
    prompts_per_step: int = Field(8, gt=0, description="prompts per rollout batch")
    responses_per_prompt: int = Field(4, gt=0, description="responses sampled for each prompt; they share its encoding")
    micro_batch_tokens: int = Field(4096, gt=0, description="packed tokens per forward and backward pass: lower needs less memory")
    save_every: int | None = Field(None, gt=0, description="steps between checkpoints (one is always saved at the end)")
    samples_every: int = Field(10, gt=0, description="steps between recorded samples (the first and last step are always recorded)")

    @model_validator(mode="after")
    def _sampling_is_the_policy(self) -> PolicyConfig:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: a policy that always does the same cannot learn from differences")
        if self.sampling.top_p < 1 or self.sampling.top_k:
            raise ValueError("sampling.top_p and top_k must be off (1 and 0): responses must come from the policy whose ratio is taken")
        return self


@cache
def policy_config(algorithm: str) -> type[PolicyConfig]:
    """The recipe type of one algorithm."""
    own = ALGORITHMS[algorithm].load().Config
    return create_model(  # type: ignore[no-any-return, call-overload]
        f"{algorithm.upper()}RecipeConfig",
        __base__=PolicyConfig,
        __doc__=f"A recipe of `trimtab {algorithm}`.",
        output=(str, Field(f"runs/{algorithm}", description="the run directory to write")),
        algorithm=(own, Field(default_factory=own, description=f"settings of {algorithm}")),
    )


def policy(name: str, config: Any, run: Path, tracker: Tracker) -> dict[str, float]:
    """Improve a policy against a reward with the algorithm `name`; returns the last step's metrics."""
    learner = PolicyLearning(name, config)
    learner.data_report(tracker)
    tracker.event("training", steps=config.steps, prompts=len(learner.prompts))
    metrics: dict[str, float] = {}
    for step in range(config.steps):
        try:
            groups, metrics = learner.step(step)
        except KeyboardInterrupt:
            save_checkpoint(run, step, tracker, **learner.actor.saveables())
            raise
        last = step + 1 == config.steps
        tracker.log(step, metrics)
        if last or step % config.samples_every == 0:
            tracker.samples(step, groups)
        if last or (config.save_every and (step + 1) % config.save_every == 0):
            save_checkpoint(run, step + 1, tracker, **learner.actor.saveables())
    return metrics


class PolicyLearning:
    """The parts of a run, put together once, and the step that uses them."""

    def __init__(self, name: str, config: Any) -> None:
        self.config = config
        model = LanguageModel.load(config.model, template=config.data.template)
        loaded = load_prompts(config.data, model.template)
        self.prompts, self.data_report = loaded.records, loaded.report
        self.cursor = Cursor(len(self.prompts), min(config.prompts_per_step, len(self.prompts)), config.seed)
        self.algorithm: Algorithm = ALGORITHMS[name].load()(config.algorithm)
        self.reward = rewards.make(config.reward, device=config.model.device, policy=model.template)
        self.shaping = RewardShaping(config.shaping)
        self.reference = make_reference(model, config.model)
        self.actor = make_actor(model, self.algorithm, self.reward, config)
        self.engine = LocalEngine(model, config.sampling, config.engine)

    def step(self, step: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """One rollout batch: sample, score, look, assign credit, update. Returns sample rows and metrics."""
        config, clock = self.config, Clock()
        with clock("generate"):
            prompts = [self.prompts[i] for i in self.cursor.at(step)]
            groups = self.engine.generate(prompts, config.responses_per_prompt, seed=seeds.derive(config.seed, "generate", step))
        with clock("reward"):
            scores = self.reward.score(groups)
        with clock("observe"):
            batch = self.look(groups, scores)
        batch = self.algorithm.credit(batch)
        with clock("update"):
            learned = self.learn(batch, step)
        self.engine.load((), step + 1)
        metrics = describe(batch, scores) | learned | {"kl/beta": float(self.algorithm.state_dict().get("beta", 0.0))}
        metrics |= {"progress/epoch": self.cursor.epoch(step + 1), **clock.seconds}
        return sample_rows(batch, scores), metrics

    def look(self, groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> Batch:
        """The batch with what policy, reference and critic say of it, and the shaped rewards.

        It is looked at in the very minibatches of the first inner epoch: there the ratio pi / pi_old is then exactly 1.
        """
        config, batch = self.config, Batch(tuple(groups))
        pieces = batch.minibatches(config.algorithm.minibatches)
        outputs = [self.actor.look(piece) for piece in pieces]
        references = [
            observe(piece, lambda b: self.reference(b, temperature=config.sampling.temperature), token_budget=config.micro_batch_tokens)
            for piece in pieces
        ]
        raw = torch.tensor([score.total for row in scores for score in row], dtype=torch.float64)
        columns = {"logprobs_old": _joined(outputs, "logprobs"), "logprobs_ref": _joined(references, "logprobs")}
        columns |= {"entropy": _joined(outputs, "entropy")}
        columns |= {"values_old": _joined(outputs, "values")} if self.algorithm.uses_critic else {}
        sampler = [logprob for g in groups for r in g.responses for logprob in r.logprobs or ()]
        columns |= {"logprobs_sampler": torch.tensor(sampler, dtype=columns["logprobs_old"].dtype)}
        return batch.with_tokens(**columns).with_responses(score=raw, reward=self.shaping(raw, batch.truncated))

    def learn(self, batch: Batch, step: int) -> dict[str, float]:
        """E epochs of M minibatches, each one optimiser step; stops early when the policy has moved past `target_kl`."""
        config, history = self.config.algorithm, []
        warming = self.algorithm.uses_critic and step < self.config.critic.warmup_steps
        for epoch in range(config.epochs):
            order = (
                None
                if epoch == 0
                else torch.randperm(len(batch.groups), generator=seeds.generator(self.config.seed, "order", step, epoch)).tolist()
            )
            for piece in batch.minibatches(config.minibatches, order):
                learn = self.actor.learn_values if warming else self.actor.learn
                history.append(learn(piece, self.algorithm, step))
            if config.target_kl is not None and not warming and history[-1]["policy/approx_kl"] > config.target_kl:
                break
        return merged(history)


def make_actor(model: LanguageModel, algorithm: Algorithm, reward: Reward, config: Any) -> ActorCritic:
    """Policy and critic in the arrangement the recipe asks for."""
    entropy = bool(getattr(config.algorithm, "entropy_weight", 0))
    passes = Passes(config.sampling.temperature, config.micro_batch_tokens, entropy)
    if not algorithm.uses_critic:
        return PolicyOnly(model, config.optim, config.steps, passes)
    if config.critic.trunk == "shared":
        return SharedTrunk(model, config.optim, config.steps, passes, config.critic)
    start = config.model
    if config.critic.init == "reward":
        if not isinstance(reward, ModelReward):
            raise ConfigError(
                "there is no single reward model to start from", where="critic.init", fix="set reward.model, or critic.init=policy"
            )
        start = start.model_copy(update={"path": config.reward.model})
    scorer = Scorer.load(start, head="saved" if config.critic.init == "reward" else "zero", template=config.data.template)
    return OwnCritic(model, config.optim, config.steps, passes, config.critic, scorer)


def _joined(outputs: Sequence[Outputs], name: str) -> torch.Tensor:
    return torch.cat([getattr(output, name) for output in outputs])
