"""Learning from preferences without a reward model: the policy is its own, r = beta (log pi - log pi_ref) + constant.

    minimise  -log sigma(beta (h_chosen - h_rejected)),     h = log pi(y | x) - log pi_ref(y | x)

The reference's log-probabilities are computed once, before training: the reference is the starting point itself.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from trimtab.batch import Batch, Counts, Loss, Outputs, observe
from trimtab.data.records import DataConfig, load_comparisons
from trimtab.maths.preference_losses import dpo
from trimtab.maths.statistics import wilson_interval
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.protocols import Tracker
from trimtab.stages.common import StageConfig, check_lengths, comparison_batch, pair_mean, save_checkpoint
from trimtab.training.fit import FitConfig, Hooks, fit
from trimtab.training.optimiser import OptimConfig, Optimiser


class DPOConfig(StageConfig):
    """A recipe of `trimtab dpo`."""

    output: str = Field("runs/dpo", description="the run directory to write")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the policy; as it is at the start, it is the reference too")
    data: DataConfig = Field(description="comparisons: chosen and rejected, or rankings (all pairs are used)")
    fit: FitConfig = Field(default_factory=FitConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-6))
    beta: float = Field(0.1, gt=0, description="strength of the implied KL penalty: higher stays nearer the reference")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed probability that a label is flipped (conservative DPO)")


def preference(config: DPOConfig, run: Path, tracker: Tracker) -> dict[str, float]:
    """Train a policy on preferences; returns the last metrics."""
    model = LanguageModel.load(config.model, template=config.data.template)
    comparisons = load_comparisons(config.data, model.template)
    comparisons.report(tracker)
    check_lengths([c.group for c in (*comparisons.records, *comparisons.holdout)], model.context, "a comparison")
    budget = config.fit.micro_batch_tokens

    start = time.perf_counter()
    data, held_out = (
        batch.with_tokens(logprobs_ref=_logprobs(model, batch, budget)) if batch.groups else batch
        for batch in (comparison_batch(comparisons.records), comparison_batch(comparisons.holdout))
    )
    tracker.event("reference", seconds=time.perf_counter() - start)

    def loss(outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.logprobs is not None
        better, worse = batch.pairs()
        h = log_ratios(outputs.logprobs, batch)

        def mean(x: Tensor) -> Tensor:
            return pair_mean(x, better, batch, counts)

        terms = dpo(h[better], h[worse], config.beta, config.label_smoothing)
        with torch.no_grad():
            logprobs = batch.sum_by_response(outputs.logprobs * batch.mask)
            means = {
                "loss/dpo": mean(terms),
                "train/accuracy": mean((h[better] > h[worse]).to(h.dtype)),
                "train/margin": mean(config.beta * (h[better] - h[worse])),
                "reward/chosen": mean(config.beta * h[better]),
                "reward/rejected": mean(config.beta * h[worse]),
                "logprob/chosen": mean(logprobs[better]),
                "logprob/rejected": mean(logprobs[worse]),
            }
        return Loss(mean(terms), means)

    def evaluate() -> dict[str, float]:
        if not held_out.groups:
            return {}
        h = log_ratios(_logprobs(model, held_out, budget), held_out)
        better, worse = held_out.pairs()
        right = int((h[better] > h[worse]).sum())
        low, high = wilson_interval(right, len(better))
        nll = dpo(h[better], h[worse], config.beta).mean()
        return {"eval/accuracy": right / len(better), "eval/accuracy_low": low, "eval/accuracy_high": high, "eval/loss": float(nll)}

    hooks = Hooks(evaluate, lambda step: save_checkpoint(run, step, tracker, model=model))
    optimiser = Optimiser(model.trainable(), config.optim, config.fit.total_steps(len(data.groups)))
    return fit(data, model.forward, loss, [optimiser], config.fit, tracker, hooks, seed=config.seed)


def log_ratios(logprobs: Tensor, batch: Batch) -> Tensor:
    """h = log pi(y | x) - log pi_ref(y | x) of every response, over the assistant's own tokens."""
    return batch.sum_by_response((logprobs - batch.tokens["logprobs_ref"]) * batch.mask)


def _logprobs(model: LanguageModel, batch: Batch, budget: int) -> Tensor:
    logprobs = observe(batch, model.forward, token_budget=budget).logprobs
    assert logprobs is not None
    return logprobs
