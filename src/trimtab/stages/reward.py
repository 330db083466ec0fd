"""Reward modelling: a scalar score per response, trained so that the preferred response scores higher.

minimise  -log sigma(r(x, y_chosen) - r(x, y_rejected) - margin)     over all pairs of every prompt
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.batch import Batch, Counts, Loss, Outputs, observe
from trimtab.data.records import DataConfig, load_comparisons
from trimtab.maths.reward_losses import bradley_terry, centring
from trimtab.maths.statistics import wilson_interval
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.protocols import Tracker
from trimtab.stages.common import StageConfig, check_lengths, comparison_batch, pair_mean, save_checkpoint
from trimtab.training.fit import FitConfig, Hooks, fit
from trimtab.training.optimiser import OptimConfig, Optimiser


class RewardModelConfig(StageConfig):
    """A recipe of `trimtab reward`."""

    output: str = Field("runs/reward", description="the run directory to write")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the language model whose trunk gets a score head")
    data: DataConfig = Field(description="comparisons: chosen and rejected, rankings, or ratings; set data.holdout to measure accuracy")
    fit: FitConfig = Field(default_factory=FitConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=2e-5))
    head_optim: OptimConfig = Field(
        default_factory=lambda: OptimConfig(lr=1e-3), description="the score head's optimiser: it starts from nothing and must move further"
    )
    head: Literal["zero", "normal", "saved"] = Field(
        "zero",
        description="the score head's start: zero (no opinion), N(0, 1/(d+1)), or as saved in a reward model that is trained further",
    )
    centring: float = Field(0.01, ge=0, description="weight of (r_chosen + r_rejected)^2, which pins the scores' free constant near 0")


def reward(config: RewardModelConfig, run: Path, tracker: Tracker) -> dict[str, float]:
    """Train a reward model; returns the last metrics, with held-out accuracy, its interval and two baselines."""
    scorer = Scorer.load(config.model, head=config.head, template=config.data.template)
    comparisons = load_comparisons(config.data, scorer.template)
    comparisons.report(tracker)
    check_lengths([c.group for c in (*comparisons.records, *comparisons.holdout)], scorer.context, "a comparison")
    data, held_out = comparison_batch(comparisons.records), comparison_batch(comparisons.holdout)

    def loss(outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.scores is not None
        better, worse = batch.pairs()
        r_better, r_worse = outputs.scores[better], outputs.scores[worse]
        terms = bradley_terry(r_better, r_worse, batch.responses["margin"][better].to(r_better.dtype))

        def mean(x: Tensor) -> Tensor:
            return pair_mean(x, better, batch, counts)

        value = mean(terms + config.centring * centring(r_better, r_worse))
        means = {"loss/pair": mean(terms), "train/accuracy": mean((r_better > r_worse).double()), "train/margin": mean(r_better - r_worse)}
        return Loss(value, means)

    def evaluate() -> dict[str, float]:
        return accuracy(scorer, held_out, config.fit.micro_batch_tokens) if held_out.groups else {}

    hooks = Hooks(evaluate, lambda step: save_checkpoint(run, step, tracker, model=scorer))
    steps, parameters = config.fit.total_steps(len(data.groups)), scorer.trainable()
    head = {name: parameters.pop(name) for name in list(parameters) if "score." in name}
    optimisers = [Optimiser(parameters, config.optim, steps), Optimiser(head, config.head_optim, steps)]
    metrics = fit(data, scorer.scores, loss, optimisers, config.fit, tracker, hooks, seed=config.seed)
    tracker.event("result", **{name: value for name, value in metrics.items() if name.startswith("eval/")})
    return metrics


def accuracy(scorer: Scorer, batch: Batch, token_budget: int) -> dict[str, float]:
    """How often the preferred response scores higher, with a Wilson 95 % interval, beside what its length alone would say."""
    scores = observe(batch, scorer.scores, token_budget=token_budget).scores
    assert scores is not None
    better, worse = batch.pairs()
    lengths = torch.tensor(batch.lengths)
    right = int((scores[better] > scores[worse]).sum())
    low, high = wilson_interval(right, len(better))
    return {
        "eval/accuracy": right / len(better),
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/pairs": float(len(better)),
        "eval/longer_wins": float((lengths[better] > lengths[worse]).double().mean()),
        "eval/shorter_wins": float((lengths[better] < lengths[worse]).double().mean()),
        "eval/margin": float((scores[better] - scores[worse]).mean()),
    }
