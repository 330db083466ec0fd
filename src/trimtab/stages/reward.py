"""Reward modelling: a scorer trained on human judgements. What it minimises is in `algorithms/reward.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab import seeds
from trimtab.algorithms.reward import READS, Kind, RewardLossConfig, reward_loss
from trimtab.batch import Batch, observe
from trimtab.config import Config
from trimtab.data.records import DataConfig, load_comparisons, load_samples
from trimtab.errors import ConfigError, DataError
from trimtab.maths import reward_losses
from trimtab.maths.statistics import wilson_interval
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.protocols import Stateful, Tracker
from trimtab.stages.common import StageConfig, check_lengths, comparison_batch
from trimtab.training.checkpoint import Checkpoints
from trimtab.training.fit import FitConfig, Hooks, fit
from trimtab.training.guards import Guards
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.types import Comparison


class EnsembleConfig(Config):
    """Several heads on one trunk: each learns from its own resampling of the prompts, so that they differ where data are few."""

    members: int = Field(1, gt=0, description="how many heads; 4 or 5 are enough to see where they disagree")
    bootstrap: bool = Field(True, description="weigh every prompt by its own Poisson(1) number for each head; false: all see the same")


class RewardModelConfig(StageConfig):
    """A recipe of `trimtab reward`."""

    output: str = Field("runs/reward", description="the run directory to write")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the language model whose trunk gets a score head")
    data: DataConfig = Field(
        description="comparisons: chosen and rejected, rankings, ratings, labels, or steps; set data.holdout to measure accuracy"
    )
    loss: RewardLossConfig = Field(default_factory=RewardLossConfig)
    ensemble: EnsembleConfig = Field(default_factory=EnsembleConfig)
    fit: FitConfig = Field(default_factory=FitConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=2e-5))
    head_optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=1e-3), description="the score head's optimiser: it starts from nothing and must move further"
    )
    head: Literal["zero", "normal", "saved"] | None = Field(
        None,
        description="the score head's start: zero (no opinion), N(0, 1/(d+1)), or as saved in a reward model that is trained further; "
        "null: zero for one head, normal for an ensemble",
    )
    normalise: DataConfig | None = Field(
        None,
        description="responses of the policy's start ({prompt, responses} or {prompt, completion}, as `trimtab sample` writes them), on "
        "which the saved model's scores shall have mean 0 and standard deviation 1",
    )

    @model_validator(mode="after")
    def _fits(self) -> RewardModelConfig:
        if READS[self.loss.kind] != "response" and (self.ensemble.members > 1 or self.normalise is not None):
            raise ValueError(f"ensemble.members and normalise are for scores of responses, not for loss.kind={self.loss.kind}")
        if self.ensemble.members > 1 and self.head == "zero":
            raise ValueError("head=zero starts all members of an ensemble alike; set head=normal")
        return self


def reward(config: RewardModelConfig, run: Path, tracker: Tracker) -> dict[str, float]:
    """Train a reward model; returns the last metrics, with held-out accuracy, its interval and two baselines."""
    scorer, members = _scorer(config), config.ensemble.members
    comparisons = load_comparisons(config.data, scorer.template)
    comparisons.report(tracker)
    check_fit(comparisons.records, config.loss.kind)
    check_lengths([c.group for c in (*comparisons.records, *comparisons.holdout)], scorer.context, "a comparison")
    data, held_out = (reward_batch(part, config.loss.kind) for part in (comparisons.records, comparisons.holdout))
    if members > 1 and config.ensemble.bootstrap:
        data = data.with_responses(**bootstrap_weights(data, members, config.seed))
    reference = None if config.normalise is None else _reference(config.normalise, scorer, tracker)
    budget = config.fit.micro_batch_tokens

    def evaluate() -> dict[str, float]:
        return held_out_metrics(scorer, held_out, config.loss.kind, budget) if held_out.groups else {}

    steps, parameters = config.fit.total_steps(len(data.groups)), scorer.trainable()
    head = {name: parameters.pop(name) for name in list(parameters) if "score." in name}
    optimisers = [Optimiser(own, how, steps) for own, how in ((parameters, config.optim), (head, config.head_optim)) if own]
    forward = scorer.scores if READS[config.loss.kind] == "response" else scorer.token_scores
    guards = Guards(run, config.guards, tracker, optimisers)
    parts: dict[str, Stateful] = {"guards": guards, **{f"optimiser_{i}": optimiser for i, optimiser in enumerate(optimisers)}}
    checkpoints = Checkpoints(
        run, config.checkpoint, tracker, parts, {"model": Normalised(scorer, reference, budget)}, resume=config.resume
    )
    loss, hooks = reward_loss(config.loss), Hooks(evaluate)
    metrics = fit(data, forward, loss, optimisers, config.fit, tracker, hooks, seed=config.seed, checkpoints=checkpoints, guards=guards)
    tracker.event("result", **{name: value for name, value in metrics.items() if name.startswith("eval/")})
    return metrics


@dataclass(frozen=True)
class Normalised:
    """A scorer as it is saved: with mean 0 and standard deviation 1 on the reference responses, if there are any."""

    scorer: Scorer
    reference: Batch | None
    token_budget: int

    def write(self, folder: Path) -> None:
        trained = self.scorer.note
        if self.reference is not None:
            normalise(self.scorer, self.reference, self.token_budget)
        try:
            self.scorer.write(folder)
        finally:
            self.scorer.note = trained  # the loss goes on seeing the heads' own scale


def _scorer(config: RewardModelConfig) -> Scorer:
    members = config.ensemble.members
    head = config.head or ("zero" if members == 1 else "normal")
    scorer = Scorer.load(config.model, head=head, template=config.data.template, heads=members)
    if scorer.heads != members:
        fix = f"set ensemble.members={scorer.heads}"
        raise ConfigError(f"the saved reward model has {scorer.heads} heads, not {members}", where="ensemble.members", fix=fix)
    scorer.note = scorer.note.model_copy(update={"reads": READS[config.loss.kind]})
    return scorer


def _reference(config: DataConfig, scorer: Scorer, tracker: Tracker) -> Batch:
    samples = load_samples(config, scorer.template)
    check_lengths(samples.records, scorer.context, "a reference response")
    tracker.event("reference", records=len(samples.records), skipped_rows=[f"{place}: {reason}" for place, reason in samples.skipped])
    return Batch(tuple(samples.records))


NEEDS: Mapping[Kind, tuple[tuple[str, ...], str]] = {
    "bradley-terry": (("pair", "ranking", "rating", "binary"), "chosen and rejected, or a ranking"),
    "hinge": (("pair", "ranking", "rating", "binary"), "chosen and rejected, or a ranking"),
    "plackett-luce": (("pair", "ranking", "rating"), "a ranking without ties"),
    "pointwise": (("rating", "binary"), "ratings"),
    "process": (("process",), "steps and labels"),
    "outcome": (("binary", "process"), "a label"),
}  # fmt: skip
"""Which judgements a loss can learn from, and how to say so."""


def check_fit(comparisons: Sequence[Comparison], kind: Kind) -> None:
    """Refuse judgements that a loss cannot learn from. Raises DataError naming the row's prompt and the fix."""
    kinds, words = NEEDS[kind]
    for c in comparisons:
        tied = kind == "plackett-luce" and len(set(c.scores)) < len(c.scores)
        if c.kind not in kinds or tied:
            what = "a ranking with ties" if tied else f"of the kind {c.kind}"
            where = f"prompt {c.group.prompt.as_text[:50]!r}"
            raise DataError(f"loss.kind={kind} needs {words}; this row is {what}", where=where, fix="set another loss.kind, or data.where")
    if kind in ("bradley-terry", "hinge") and not any(c.pairs() for c in comparisons):
        fix = "give several responses to a prompt, or set loss.kind=pointwise or outcome"
        raise DataError("no row has two responses of which one is better", where="data", fix=fix)


def reward_batch(comparisons: Sequence[Comparison], kind: Kind) -> Batch:
    """`comparison_batch`, with the response column `probability`; for steps the token columns `label` and `judged` too."""
    sure = [c.probability for c in comparisons for _ in c.scores]
    batch = comparison_batch(comparisons).with_responses(probability=torch.tensor(sure, dtype=torch.float64))
    if kind != "process":
        return batch
    label, judged = torch.zeros(sum(batch.lengths), dtype=torch.float64), torch.zeros(sum(batch.lengths), dtype=torch.bool)
    starts = batch.last_token - torch.tensor(batch.lengths) + 1
    for c, start in zip(comparisons, starts.tolist(), strict=True):
        for step in c.steps:
            if step.label is not None:
                label[start + step.end], judged[start + step.end] = step.label, True
    return batch.with_tokens(label=label, judged=judged)


def bootstrap_weights(batch: Batch, members: int, seed: int) -> dict[str, Tensor]:
    """Response columns `weight_k`: how often head k sees a prompt, Poisson(1) (Oza and Russell 2001).

    They depend on seed, prompt and head alone: all responses to a prompt weigh the same, in whatever order it comes.
    """

    def weight(text: str, head: int) -> float:
        return float(torch.poisson(torch.ones(()), generator=seeds.generator(seed, f"bootstrap {text}", head)))

    tables = [[weight(group.prompt.as_text, k) for group in batch.groups] for k in range(members)]
    return {f"weight_{k}": torch.tensor(table, dtype=torch.float64)[batch.group_of_response] for k, table in enumerate(tables)}


def normalise(scorer: Scorer, reference: Batch, token_budget: int) -> None:
    """Give every head mean 0 and standard deviation 1 on reference responses. Raises DataError if it scores them all alike."""
    members = observe(reference, scorer.scores, token_budget=token_budget).members
    assert members is not None
    try:
        gain, bias = zip(*(reward_losses.normalisation(r.double()) for r in members.unbind(1)), strict=True)
    except ValueError as error:
        raise DataError(str(error), where="normalise", fix="give several different responses") from None
    scorer.normalise(gain, bias)


def held_out_metrics(scorer: Scorer, batch: Batch, kind: Kind, token_budget: int) -> dict[str, float]:
    """How well held-out judgements are predicted: accuracy with its interval, and what else the loss is about."""
    if READS[kind] != "response":
        return _token_accuracy(scorer, batch, kind, token_budget)
    metrics = accuracy(scorer, batch, token_budget) if len(batch.pairs()[0]) else {}
    if kind != "pointwise":
        return metrics
    scores, ratings = observe(batch, scorer.scores, token_budget=token_budget).scores, batch.responses["judgement"]
    assert scores is not None
    return metrics | {"eval/squared_error": float((scores - ratings).square().mean())}


def accuracy(scorer: Scorer, batch: Batch, token_budget: int) -> dict[str, float]:
    """How often the preferred response scores higher, with a Wilson 95 % interval, beside what its length alone would say.

    For an ensemble also how often its heads do not agree.
    """
    outputs = observe(batch, scorer.scores, token_budget=token_budget)
    scores, members = outputs.scores, outputs.members
    assert scores is not None
    assert members is not None
    better, worse = batch.pairs()
    lengths = torch.tensor(batch.lengths)
    right = int((scores[better] > scores[worse]).sum())
    metrics = _proportion(right, len(better)) | {
        "eval/pairs": float(len(better)),
        "eval/longer_wins": float((lengths[better] > lengths[worse]).double().mean()),
        "eval/shorter_wins": float((lengths[better] < lengths[worse]).double().mean()),
        "eval/margin": float((scores[better] - scores[worse]).mean()),
    }
    if scorer.heads == 1:
        return metrics
    votes = (members[better] > members[worse]).double().mean(1)
    return metrics | {"eval/disagreement": float(((votes > 0) & (votes < 1)).double().mean())}


def _token_accuracy(scorer: Scorer, batch: Batch, kind: Kind, token_budget: int) -> dict[str, float]:
    """Of judged steps (process), or of responses at their last token (outcome), how many are on the right side of 0."""
    logits = observe(batch, scorer.token_scores, token_budget=token_budget).token_scores
    assert logits is not None
    if kind == "process":
        judged = batch.tokens["judged"]
        said, truth = logits[judged] > 0, batch.tokens["label"][judged] > 0.5
    else:
        said, truth = logits[batch.last_token] > 0, batch.responses["judgement"] > 0.5
    if not len(truth):
        return {}
    return _proportion(int((said == truth).sum()), len(truth)) | {
        "eval/judged": float(len(truth)),
        "eval/right": float(truth.double().mean()),
    }


def _proportion(right: int, n: int) -> dict[str, float]:
    low, high = wilson_interval(right, n)
    return {"eval/accuracy": right / n, "eval/accuracy_low": low, "eval/accuracy_high": high}
