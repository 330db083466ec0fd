"""Policy learning: sample, score, assign credit, update. max E[r(x, y)] - beta KL(pi || pi_ref), from the start's parameters.

One loop for every algorithm; what differs between them is in `algorithms/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator

from trimtab import interrupt, rewards, seeds
from trimtab.algorithms import ALGORITHMS
from trimtab.algorithms.base import PolicyGradientConfig, ReferenceConfig
from trimtab.algorithms.explain import causes, weights
from trimtab.batch import Batch, Outputs, observe
from trimtab.data.cursor import Cursor
from trimtab.data.records import DataConfig, load_prompts
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.errors import ConfigError
from trimtab.maths.advantages import leave_one_out
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.models.reference import MovingReference, Reference, make_reference
from trimtab.models.scorer import Scorer
from trimtab.protocols import Algorithm, Reward, Stateful, Tracker
from trimtab.rewards import RewardConfig
from trimtab.rewards.isolation import Failures, none_scored, scored
from trimtab.rewards.model import ModelReward
from trimtab.rewards.shaping import RewardShaping, ShapingConfig
from trimtab.stages.actor_critic import ActorCritic, CriticConfig, OwnCritic, Passes, PolicyOnly, SharedTrunk
from trimtab.stages.common import StageConfig, recipe_type, report_failures
from trimtab.stages.explanation import Explained, write_explanation
from trimtab.stages.overlap import Begun, Overlap, Sampled, second
from trimtab.stages.policy_metrics import Rollout, describe, merged, sample_rows, staleness
from trimtab.training import finite
from trimtab.training.checkpoint import Checkpoints, each_step
from trimtab.training.clock import Clock
from trimtab.training.guards import Guards, skipping
from trimtab.training.optimiser import OptimConfig
from trimtab.types import Group, Score


class PolicyConfig(StageConfig):
    """A recipe of policy learning; `algorithm` holds the settings of the algorithm that the command names."""

    algorithm: PolicyGradientConfig = Field(default_factory=PolicyGradientConfig, description="settings of the algorithm")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the policy; as it is at the start, it is the reference too")
    reference: ReferenceConfig = Field(default_factory=ReferenceConfig, description="what the KL penalty is measured to")
    roles: Literal["standard", "textbook"] = Field(
        "standard",
        description="who samples and is the ratio's denominator: the policy of this step; textbook: the reference, in all three roles",
    )
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
    micro_batch_tokens: int = Field(
        2048, gt=0, description="packed tokens per forward and backward pass, for which large groups are cut: lower needs less memory"
    )
    overlap: bool = Field(
        False,
        description="sample and score the next rollout beside the update, with a copy of what is trained: what is learnt from is then one "
        "update old, which algorithm.mismatch corrects. It gains where rewards wait and where sampling leaves cores idle",
    )
    explain_prompts: int = Field(
        4, ge=0, description="at steps whose samples are recorded: prompts whose responses are written token by token for `trimtab explain`"
    )
    samples_every: int = Field(10, gt=0, description="steps between recorded samples (the first and last step are always recorded)")

    @model_validator(mode="after")
    def _reference_is_needed(self) -> PolicyConfig:
        kl, needed = self.algorithm.kl, []
        needed += ["algorithm.kl.beta=0"] if kl.beta > 0 else []
        needed += ["algorithm.kl.target=null"] if kl.target is not None else []
        needed += ["roles=standard"] if self.roles == "textbook" else []
        if self.reference.role == "none" and needed:
            raise ValueError(f"reference.role=none leaves nothing to measure KL to: also set {' and '.join(needed)}")
        return self

    @model_validator(mode="after")
    def _old_samples_are_corrected(self) -> PolicyConfig:
        if self.overlap and self.algorithm.mismatch.kind == "none":
            raise ValueError("overlap=true learns from what the policy sampled one update ago: also set algorithm.mismatch.kind=truncate")
        if self.overlap and self.roles == "textbook":
            raise ValueError("overlap=true is for a policy that samples itself: set roles=standard")
        return self

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
    return recipe_type(algorithm, PolicyConfig, ALGORITHMS[algorithm].load().Config)  # type: ignore[no-any-return]


def policy(name: str, config: PolicyConfig, run: Path, tracker: Tracker) -> dict[str, float]:
    """Improve a policy against a reward with the algorithm `name`; returns the last step's metrics."""
    with closing(PolicyLearning(name, config)) as learner:
        learner.data_report(tracker)
        guards = Guards(run, config.guards, tracker, [*learner.actor.optimisers().values()])
        parts = {**learner.parts(), "guards": guards}
        checkpoints = Checkpoints(run, config.checkpoint, tracker, parts, learner.actor.saveables(), resume=config.resume)
        start = checkpoints.start()
        tracker.event("training", steps=config.steps, prompts=len(learner.prompts), done=start)

        def one(step: int) -> dict[str, float]:
            rollout, metrics = None, dict[str, float]()
            with guards.skipping():
                rollout, metrics = learner.step(step, guards)
                report_failures(tracker, step, rollout.failures)
            guards.see(loss=metrics.get("policy/loss"), kl=metrics.get("kl/mean"))
            metrics |= guards.metrics()
            tracker.log(step, metrics)
            if rollout is None:
                learner.move_on(step)
            elif learner.recorded(step):
                tracker.samples(step, sample_rows(rollout))
                if config.explain_prompts:
                    write_explanation(run, step, learner.explain(rollout))
            return metrics

        return each_step(one, start, config.steps, checkpoints, guards)


class PolicyLearning:
    """The parts of a run, put together once, and the step that uses them."""

    def __init__(self, name: str, config: PolicyConfig) -> None:
        self.config = config
        model = LanguageModel.load(config.model, template=config.data.template)
        loaded = load_prompts(config.data, model.template)
        self.prompts, self.data_report = loaded.records, loaded.report
        settings = config.algorithm
        if settings.length is None:
            settings = settings.model_copy(update={"length": config.sampling.max_tokens})
        self.algorithm: Algorithm = ALGORITHMS[name].load()(settings)
        sampler = second(model) if config.overlap else model
        self.reward = rewards.make(config.reward, device=config.model.device, policy=sampler.template, excludes=True, seed=config.seed)
        self.shaping = RewardShaping(config.shaping, config.sampling.max_tokens)
        self.reference = make_reference(model, config.model, config.reference, samples=config.roles == "textbook")
        self.actor = make_actor(model, self.algorithm, self.reward, self.reference, config)
        scratch = None if config.overlap else self.actor.optimisers()["policy"].scratch
        self.engine = LocalEngine(sampler, config.sampling, config.engine, scratch)
        self.overlap = Overlap(self._rollout_beside, self._refresh_sampler) if config.overlap else None
        self.greedy_engine = LocalEngine(model, config.sampling.model_copy(update={"temperature": 0.0}), config.engine, scratch)

    def step(self, step: int, guards: Guards | None = None) -> tuple[Rollout, dict[str, float]]:
        """One rollout batch: sample, score, look, assign credit, update. Returns the rollout and the metrics."""
        config, clock = self.config, Clock()
        if self.overlap is None:
            self.engine.load((), step)
        groups, scores, dropped, failures = self.rollout(step, clock)
        with clock("observe"):
            batch = self.look(groups, scores, refer=self.refers(step), ahead=not self.warming(step))
            if self.algorithm.greedy_baseline:
                baseline, failed = self.greedy_returns(groups, batch)
                batch, failures = batch.with_responses(baseline=baseline), failures + failed
        batch = self.algorithm.credit(batch)
        with clock("update"):
            learned = self.learn(batch, step, guards)
        self.move_on(step)
        metrics = describe(batch, scores) | learned | {"kl/beta": float(self.algorithm.state_dict()["beta"])}
        metrics |= failures.metrics() if config.reward.tolerates else {}
        metrics |= {"rollout/dropped_groups": float(dropped)} if config.algorithm.resample else {}
        metrics |= {"rollout/staleness": staleness(groups, step)} if config.overlap else {}
        metrics |= {"progress/epoch": self._cursor(0).epoch(step + 1), **clock.seconds}
        return Rollout(batch, scores, failures), metrics

    def parts(self) -> dict[str, Stateful]:
        """What decides the rest of a run."""
        parts: dict[str, Stateful] = {"overlap": Begun(self.overlap)} if self.overlap else {}  # first: until it is done the others change
        parts |= {**self.actor.optimisers(), "algorithm": self.algorithm, "shaping": self.shaping}
        parts |= {"reward": rewards.State(self.reward), "memory": self.engine.memory}
        return parts | ({"reference": self.reference} if isinstance(self.reference, MovingReference) else {})

    def move_on(self, step: int) -> None:
        """After a step, whatever was learnt: let the reference follow."""
        if self.reference is not None:
            self.reference.follow(self.config.reference, step + 1)

    def rollout(self, step: int, clock: Clock) -> Sampled:
        """What is learnt from at a step: sampled now, or, with overlap, begun a step ago."""
        if self.overlap is None:
            return self.sample(step, clock)
        with clock("wait"):
            sampled, beside = self.overlap.take(step, more=step + 1 < self.config.steps)
        clock.before("wait", self.overlap.waited())
        clock.parts |= {f"time/beside/{part.removeprefix('time/')}": seconds for part, seconds in beside.parts.items()}
        return sampled

    def _rollout_beside(self, step: int) -> tuple[Sampled, Clock]:
        clock = Clock()
        return self.sample(step, clock), clock

    def _refresh_sampler(self, step: int) -> None:
        self.engine.load(self.actor.policy.trainable().items(), step)

    def close(self) -> None:
        """End what runs beside the steps."""
        if self.overlap is not None:
            self.overlap.close()

    def sample(self, step: int, clock: Clock) -> Sampled:
        """Groups and their scores. With `resample`, groups whose responses all scored alike make room for those of further prompts,

        round by round; what is still missing after the last round is filled with them again. Also: how many were dropped, and which
        responses have no score: they are left out, and so is a group of which too little is left to compare."""
        config, failures = self.config, Failures()
        least = 2 if self.algorithm.compares and config.responses_per_prompt > 1 else 1
        kept: list[tuple[Group, list[Score]]] = []
        alike: list[tuple[Group, list[Score]]] = []
        for attempt in range(config.algorithm.resample + 1):
            with clock("generate"), self._sampler():
                prompts = [self.prompts[i] for i in self._cursor(attempt).at(step)]
                seed = seeds.derive(config.seed, "generate", step, *([attempt] if attempt else []))
                groups = self.engine.generate(prompts, config.responses_per_prompt, seed=seed)
            with clock("reward"), interrupt.at_once():
                groups, scores, failed = scored(groups, self.reward.score(groups), least)
                failures += failed
            for group, row in zip(groups, scores, strict=True):
                useful = not config.algorithm.resample or max(s.total for s in row) > min(s.total for s in row)
                (kept if useful else alike).append((group, row))
            if len(kept) >= len(prompts):
                break
        self.engine.sleep()
        chosen = (kept + alike)[: len(prompts)]
        if not chosen:
            raise none_scored()
        return [group for group, _ in chosen], [row for _, row in chosen], len(alike), failures

    def recorded(self, step: int) -> bool:
        """Whether the samples of a step are written down."""
        return step + 1 == self.config.steps or step % self.config.samples_every == 0

    def refers(self, step: int) -> bool:
        """Whether the reference is asked at a step: always if anything is learnt from it, else where samples are shown with their KL."""
        kl = self.config.algorithm.kl
        needed = kl.beta > 0 or kl.target is not None or self.config.roles == "textbook"
        return self.reference is not None and (needed or self.recorded(step))

    def warming(self, step: int) -> bool:
        """Whether only the critic learns at a step."""
        return self.algorithm.uses_critic and step < self.config.critic.warmup_steps

    def look(self, groups: Sequence[Group], scores: Sequence[Sequence[Score]], *, refer: bool | None = None, ahead: bool = False) -> Batch:
        """The batch with what policy, reference and critic say of it, and the shaped rewards.

        It is looked at in the very minibatches of the first inner epoch: there the ratio pi / pi_old is then exactly 1.
        refer: ask the reference (null: if there is one). ahead: it is learnt from next.
        """
        config, batch = self.config, Batch(tuple(groups), apart=True)
        refer = self.reference is not None if refer is None else refer
        pieces = batch.minibatches(config.algorithm.minibatches)
        reference = [self._refer(piece) for piece in pieces] if refer else []  # first: the policy's own pass may stay in memory
        outputs = [self.actor.look(piece, ahead=ahead and piece is pieces[0]) for piece in pieces]
        columns = {"logprobs_old": _joined(outputs, "logprobs"), "entropy": _joined(outputs, "entropy")}
        columns |= {"values_old": _joined(outputs, "values")} if self.algorithm.uses_critic else {}
        columns |= {"full_kl": _joined(outputs, "full_kl")} if outputs[0].full_kl is not None else {}
        if reference:
            columns["logprobs_ref"] = _joined(reference, "logprobs")
            if config.roles == "textbook":
                columns["logprobs_old"] = columns["logprobs_ref"]
        sampler = [logprob for g in groups for r in g.responses for logprob in r.logprobs or ()]
        columns |= {"logprobs_sampler": torch.tensor(sampler, dtype=columns["logprobs_old"].dtype)}
        if any(score.placed for row in scores for score in row):
            columns["placed"] = _placed(batch, scores).to(columns["logprobs_old"].dtype)
        batch = batch.with_tokens(**columns)
        finite.check(batch, config.micro_batch_tokens)  # before shaping and credit take these numbers into their running statistics
        raw, shaped = self._shaped(batch, scores)
        return batch.with_responses(score=raw, reward=shaped)

    def _shaped(self, batch: Batch, scores: Sequence[Sequence[Score]]) -> tuple[torch.Tensor, torch.Tensor]:
        """The scores of a batch's responses as they are, and after shaping."""
        raw = torch.tensor([score.total for row in scores for score in row], dtype=torch.float64)
        return raw, self.shaping(raw, torch.tensor(batch.lengths), batch.truncated)

    def greedy_returns(self, groups: Sequence[Group], batch: Batch) -> tuple[torch.Tensor, Failures]:
        """For every response of the batch: the return (reward and penalty) of its prompt's greedy response; and which have no score.

        There the mean return of the prompt's other responses takes its place: it, too, does not depend on the response itself.
        """
        with self._sampler():
            greedy = self.greedy_engine.generate([group.prompt for group in groups], 1, seed=0)
            self.greedy_engine.sleep()
        with interrupt.at_once():
            state, all_scores = self.shaping.state_dict(), self.reward.score(greedy)
        there = torch.tensor([not row[0].missing for row in all_scores])
        greedy, scores, failures = scored(greedy, all_scores)
        if not greedy:
            returns = batch.tokens["logprobs_old"].new_zeros(0)
        elif self.config.algorithm.kl.in_reward:
            looked = self.look(greedy, scores)
            returns = looked.sum_by_response(self.algorithm.rewards(looked))
        else:  # the return is the reward alone, for which no model is asked
            returns = self._shaped(Batch(tuple(greedy)), scores)[1].to(batch.tokens["logprobs_old"].dtype)
        self.shaping.load_state_dict(state)  # the running statistics are those of the sampled responses
        if there.all():
            return returns[batch.group_of_response], failures
        instead = leave_one_out(batch.sum_by_response(self.algorithm.rewards(batch)), batch.group_of_response).to(returns.dtype)
        spread = returns.new_zeros(len(groups)).masked_scatter(there, returns)
        return torch.where(there[batch.group_of_response], spread[batch.group_of_response], instead), failures

    def learn(self, batch: Batch, step: int, guards: Guards | None = None) -> dict[str, float]:
        """E epochs of M minibatches, each one optimiser step; stops early when the policy has moved past `target_kl`."""
        config, history = self.config.algorithm, []
        warming = self.warming(step)
        for epoch in range(config.epochs):
            order = (
                None
                if epoch == 0
                else torch.randperm(len(batch.groups), generator=seeds.generator(self.config.seed, "order", step, epoch)).tolist()
            )
            for piece in batch.minibatches(config.minibatches, order):
                learn = self.actor.learn_values if warming else self.actor.learn
                with skipping(guards):
                    history.append(learn(piece, self.algorithm, step))
            if config.target_kl is not None and not warming and history and history[-1]["policy/approx_kl"] > config.target_kl:
                break
        return merged(history) if history else {}

    def explain(self, rollout: Rollout) -> Explained:
        """The first prompts of a step, token by token: causes of every advantage, and how the loss pulls after the update."""
        batch = rollout.batch.with_tokens(**causes(self.algorithm, rollout.batch))
        shown = range(min(self.config.explain_prompts, len(batch.groups)))
        batch, scores = batch.select(shown), [rollout.scores[i] for i in shown]
        outputs = self.actor.look(batch)
        assert outputs.logprobs is not None
        batch = batch.with_tokens(logprobs_now=outputs.logprobs, **weights(self.algorithm, batch, outputs))
        return Explained(batch, scores, self.actor.policy.template)

    def _sampler(self) -> AbstractContextManager[None]:
        """While responses are drawn, the model is the policy that samples."""
        return self.reference.in_place() if self.reference and self.config.roles == "textbook" else nullcontext()

    def _refer(self, batch: Batch) -> Outputs:
        assert self.reference is not None
        forward, temperature = self.reference.forward, self.config.sampling.temperature
        return observe(batch, lambda b: forward(b, temperature=temperature), token_budget=self.config.micro_batch_tokens)

    def _cursor(self, attempt: int) -> Cursor:
        """Which prompts come at a step; further attempts walk through the data in orders of their own."""
        seed = seeds.derive(self.config.seed, "resample", attempt) if attempt else self.config.seed
        return Cursor(len(self.prompts), min(self.config.prompts_per_step, len(self.prompts)), seed)


def make_actor(
    model: LanguageModel, algorithm: Algorithm, reward: Reward, reference: Reference | None, config: PolicyConfig
) -> ActorCritic:
    """Policy and critic in the arrangement the recipe asks for."""
    full_kl_to = reference if config.algorithm.kl.needs_full else None
    passes = Passes(config.sampling.temperature, config.micro_batch_tokens, config.algorithm.entropy_weight > 0, full_kl_to)
    if not algorithm.uses_critic:
        return PolicyOnly(model, config.optim, config.steps, passes)
    if config.critic.trunk == "shared":
        return SharedTrunk(model, config.optim, config.steps, passes, config.critic)
    start = config.model
    if config.critic.init == "reward":
        if not isinstance(rewards.bare(reward), ModelReward):
            raise ConfigError(
                "there is no single reward model to start from", where="critic.init", fix="set reward.model, or critic.init=policy"
            )
        start = start.model_copy(update={"path": config.reward.model})
    scorer = Scorer.load(start, head="saved" if config.critic.init == "reward" else "zero", template=config.data.template)
    return OwnCritic(model, config.optim, config.steps, passes, config.critic, scorer)


def _placed(batch: Batch, scores: Sequence[Sequence[Score]]) -> torch.Tensor:
    """What rewards put on single tokens, as a token column; a response whose reward names no token gets its score at the end."""
    flat = [score for row in scores for score in row]
    column = torch.zeros(sum(batch.lengths), dtype=torch.float64)
    starts = (batch.last_token - torch.tensor(batch.lengths) + 1).tolist()
    for start, length, score in zip(starts, batch.lengths, flat, strict=True):
        for index, value in score.placed or ((length - 1, score.total),):
            column[start + index] += value
    return column


def _joined(outputs: Sequence[Outputs], name: str) -> torch.Tensor:
    return torch.cat([getattr(output, name) for output in outputs])
