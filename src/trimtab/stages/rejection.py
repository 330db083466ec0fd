"""Rejection-sampling fine-tuning (RAFT): sample n responses to every prompt, keep the best by a reward, fine-tune on them; again.

    for every round:   y_1..y_n ~ pi(. | x),   keep S(x) = the best of them,   minimise -sum_{y in S(x)} log pi(y | x)

Source: Dong et al. 2023 (RAFT); Touvron et al. 2023 (Llama 2, section 3.2.3). With keep=1 it teaches the policy what best-of-n
would have answered, without the n samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab import interrupt, rewards, seeds
from trimtab.batch import Batch, Outputs, observe
from trimtab.data.cursor import Cursor
from trimtab.data.records import DataConfig, load_prompts
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.errors import RewardError
from trimtab.maths.reductions import Aggregation
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.models.reference import frozen_reference
from trimtab.protocols import Stateful, Tracker
from trimtab.rewards import RewardConfig
from trimtab.rewards.isolation import Failures, none_scored, scored
from trimtab.stages.common import StageConfig, nll_loss, part_means, report_failures, sample_row
from trimtab.stages.sample import select
from trimtab.training import finite
from trimtab.training.checkpoint import Checkpoints, each_step
from trimtab.training.fit import FitConfig, Hooks, fit
from trimtab.training.guards import Guards, skipping
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.types import Group, Score

SHOWN = 16
"""Responses recorded per round."""


class RejectionConfig(StageConfig):
    """A recipe of `trimtab rejection`."""

    output: str = Field("runs/rejection", description="the run directory to write")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the policy; KL is measured to it as it is at the start")
    data: DataConfig = Field(description="prompts")
    reward: RewardConfig = Field(default_factory=RewardConfig, description="what chooses among the responses")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    rounds: int = Field(3, gt=0, description="times that the current policy is sampled and then fine-tuned")
    prompts_per_round: int | None = Field(None, gt=0, description="prompts sampled in a round (null: all of them)")
    n: int = Field(8, gt=0, description="responses sampled for each prompt")
    keep: int = Field(1, gt=0, description="different responses kept of each prompt, the highest-scoring ones")
    threshold: float | None = Field(None, description="keep none that scores less; a prompt without any is left out of the round")
    epochs: float = Field(1.0, gt=0, description="passes over what a round has kept")
    batch_size: int = Field(16, gt=0, description="prompts per optimiser step")
    micro_batch_tokens: int = Field(2048, gt=0, description="packed tokens per forward and backward pass: lower needs less memory")
    optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=1e-5, schedule="constant"), description="its schedule begins anew every round"
    )
    aggregation: Aggregation = Field("token", description="how per-token losses are averaged")

    @model_validator(mode="after")
    def _something_to_choose(self) -> RejectionConfig:
        if self.keep > self.n:
            raise ValueError(f"keep ({self.keep}) is more than n ({self.n})")
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature must be above 0: greedy responses are all the same")
        return self


@dataclass(frozen=True)
class Sampled:
    """A round's responses: what the reward says of them, their KL to the start in nats, which were kept, and which had no score."""

    groups: list[Group]
    scores: list[list[Score]]
    kl: Tensor
    kept: list[list[int]]
    failures: Failures


def rejection(config: RejectionConfig, run: Path, tracker: Tracker) -> dict[str, float]:
    """Sample, select and fine-tune for `rounds` rounds. Logs one line a round, and one of the final policy, whose metrics it returns."""
    rounds = Rounds(config, tracker)
    guards = rounds.guards = Guards(run, config.guards, tracker, [rounds.optimiser])
    parts: dict[str, Stateful] = {"model": rounds.optimiser, "memory": rounds.engine.memory, "reward": rewards.State(rounds.reward)}
    parts |= {"guards": guards}
    checkpoints = Checkpoints(run, config.checkpoint, tracker, parts, {"model": rounds.model}, resume=config.resume)
    start = checkpoints.start()
    tracker.event("training", steps=config.rounds + 1, prompts=len(rounds.prompts), done=start)
    each_step(rounds.one, start, config.rounds, checkpoints, guards)
    return rounds.report(config.rounds, rounds.sample(config.rounds), {})


class Rounds:
    """The parts of a run, put together once, and the round that uses them."""

    def __init__(self, config: RejectionConfig, tracker: Tracker) -> None:
        self.config, self.tracker = config, tracker
        self.model = LanguageModel.load(config.model, template=config.data.template)
        loaded = load_prompts(config.data, self.model.template)
        loaded.report(tracker)
        self.prompts = loaded.records
        self.cursor = Cursor(len(self.prompts), min(config.prompts_per_round or len(self.prompts), len(self.prompts)), config.seed)
        self.reward = rewards.make(config.reward, device=config.model.device, policy=self.model.template, excludes=True, seed=config.seed)
        self.reference = frozen_reference(self.model, config.model)
        self.optimiser = Optimiser(self.model.trainable(), config.optim, 1)
        self.engine = LocalEngine(self.model, config.sampling, config.engine, self.optimiser.scratch)
        self.guards: Guards | None = None

    def one(self, number: int) -> dict[str, float]:
        """One round; returns its metrics. Without numbers to select by (guards.skip), the round is left out."""
        sampled = None
        with skipping(self.guards):
            sampled = self.sample(number)
        if sampled is None:
            metrics = self.guards.metrics() if self.guards else {}
            self.tracker.log(number, metrics)
            return metrics
        chosen = Batch(tuple(group.only(kept) for group, kept in zip(sampled.groups, sampled.kept, strict=True) if kept), apart=True)
        if not chosen.groups:
            best = max(score.total for row in sampled.scores for score in row)
            raise RewardError(
                f"no response of round {number + 1} scores at least {self.config.threshold} (the best scores {best:.4g})",
                fix="lower threshold, raise n, or start from a better model",
            )
        learnt = self.learn(chosen, number)
        if self.guards is not None:
            self.guards.see(loss=learnt.get("loss/nll"), kl=float(sampled.kl.mean()))
            learnt |= self.guards.metrics()
        return self.report(number, sampled, learnt)

    def sample(self, number: int) -> Sampled:
        """The round's prompts, answered n times by the policy as it is, scored and selected."""
        config = self.config
        self.engine.load((), number)
        prompts = [self.prompts[i] for i in self.cursor.at(number)]
        groups = self.engine.generate(prompts, config.n, seed=seeds.derive(config.seed, "generate", number))
        self.engine.sleep()
        with interrupt.at_once():
            groups, scores, failures = scored(groups, self.reward.score(groups))
        if not groups:
            raise none_scored()
        log_ratio = self._logprobs(groups, self.model.forward) - self._logprobs(groups, self.reference.forward)
        batch = Batch(tuple(groups)).with_tokens(log_ratio=log_ratio)
        finite.check(batch, config.micro_batch_tokens)
        kl = batch.sum_by_response(log_ratio)
        return Sampled(groups, scores, kl, select(groups, scores, config.keep, config.threshold), failures)

    def _logprobs(self, groups: list[Group], forward: Callable[..., Outputs]) -> Tensor:
        temperature, budget = self.config.sampling.temperature, self.config.micro_batch_tokens
        logprobs = observe(Batch(tuple(groups)), lambda batch: forward(batch, temperature=temperature), token_budget=budget).logprobs
        assert logprobs is not None
        return logprobs

    def learn(self, chosen: Batch, number: int) -> dict[str, float]:
        """Fine-tune on what was kept. Adam's moments live on from round to round."""
        config, losses = self.config, Losses()
        plan = FitConfig(batch_size=config.batch_size, epochs=config.epochs, micro_batch_tokens=config.micro_batch_tokens)
        self.optimiser.total_steps = plan.total_steps(len(chosen.groups))
        seed = seeds.derive(config.seed, "order of the kept", number)
        loss, hooks = nll_loss(config.aggregation), Hooks(dict)
        fit(chosen, self.model.forward, loss, [self.optimiser], plan, losses, hooks, seed=seed, guards=self.guards)
        return losses.means()

    def report(self, number: int, sampled: Sampled, learnt: Mapping[str, float]) -> dict[str, float]:
        """Log a round's metrics and the best responses; returns the metrics."""
        report_failures(self.tracker, number, sampled.failures)
        metrics = describe(sampled) | dict(learnt) | (sampled.failures.metrics() if self.config.reward.tolerates else {})
        metrics |= {"progress/epoch": self.cursor.epoch(number + bool(learnt))}
        self.tracker.log(number, metrics)
        self.tracker.samples(number, sample_rows(sampled)[:SHOWN])
        return metrics


class Losses:
    """A tracker that keeps the metrics of a round's optimiser steps, of which the run reports the means."""

    def __init__(self) -> None:
        self.steps: list[Mapping[str, float]] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(metrics)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None: ...

    def event(self, kind: str, **details: Any) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...

    def means(self) -> dict[str, float]:
        names = ("loss/nll", "optim/grad_norm", "optim/lr", *(name for name in self.steps[0] if name.startswith("time/")))
        taken = [step for step in self.steps if "loss/nll" in step]  # without those that were left out
        means = {name: sum(step[name] for step in taken) / len(taken) for name in names} if taken else {}
        return means | {"progress/updates": len(taken)}


def describe(sampled: Sampled) -> dict[str, float]:
    """Reward, KL and length of all responses, and of those that were kept."""
    batch = Batch(tuple(sampled.groups))
    flat = [score for row in sampled.scores for score in row]
    totals = torch.tensor([score.total for score in flat], dtype=torch.float64)
    lengths = torch.tensor(batch.lengths, dtype=torch.float64)
    first, kept = 0, list[int]()
    for group, chosen in zip(sampled.groups, sampled.kept, strict=True):
        kept += [first + i for i in chosen]
        first += len(group.responses)
    metrics = {"reward/mean": totals.mean(), "reward/std": totals.std(correction=0), "kl/mean": sampled.kl.mean()}
    metrics |= {"kl/per_token": sampled.kl.sum() / lengths.sum(), "response/length": lengths.mean()}
    metrics |= {"response/truncated": batch.truncated.double().mean(), "selection/kept": torch.tensor(len(kept) / len(totals))}
    metrics |= {"selection/prompts": torch.tensor([bool(chosen) for chosen in sampled.kept]).double().mean()}
    metrics |= part_means(flat)
    if kept:
        metrics |= {"selection/reward": totals[kept].mean(), "selection/length": lengths[kept].mean()}
    return {name: float(value) for name, value in metrics.items()}


def sample_rows(sampled: Sampled) -> list[dict[str, Any]]:
    """The best response to every prompt that kept one."""
    rows, first = list[dict[str, Any]](), 0
    for group, scores, kept in zip(sampled.groups, sampled.scores, sampled.kept, strict=True):
        if kept:
            best = kept[0]
            score, kl = scores[best], float(sampled.kl[first + best])
            rows.append(sample_row(group.prompt, group.responses[best], score.total, score.parts, kl))
        first += len(group.responses)
    return rows
