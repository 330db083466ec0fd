"""Supervised fine-tuning: raise the probability of demonstrated answers.

minimise  -sum_t log pi(y_t | x, y_<t)   over the assistant's own tokens
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field

from trimtab.batch import Batch, observe
from trimtab.data.records import DataConfig, load_demonstrations
from trimtab.maths.reductions import Aggregation
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.protocols import Tracker
from trimtab.stages.common import StageConfig, check_lengths, nll_loss
from trimtab.training.checkpoint import Checkpoints
from trimtab.training.fit import FitConfig, Hooks, fit
from trimtab.training.guards import Guards
from trimtab.training.optimiser import OptimConfig, Optimiser


class SFTConfig(StageConfig):
    """A recipe of `trimtab sft`."""

    output: str = Field("runs/sft", description="the run directory to write")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model to fine-tune")
    data: DataConfig = Field(description="demonstrations: prompt and completion, or messages")
    fit: FitConfig = Field(default_factory=FitConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=2e-5))
    aggregation: Aggregation = Field("token", description="how per-token losses are averaged")


def sft(config: SFTConfig, run: Path, tracker: Tracker) -> dict[str, float]:
    """Fine-tune on demonstrations; returns the last metrics, `eval/nll` on the held-out part among them."""
    model = LanguageModel.load(config.model, template=config.data.template)
    demonstrations = load_demonstrations(config.data, model.template)
    demonstrations.report(tracker)
    check_lengths([*demonstrations.records, *demonstrations.holdout], model.context, "a demonstration")
    data, held_out = (Batch(tuple(records), apart=True) for records in (demonstrations.records, demonstrations.holdout))

    def evaluate() -> dict[str, float]:
        if not held_out.groups:
            return {}
        logprobs = observe(held_out, model.forward, token_budget=config.fit.micro_batch_tokens).logprobs
        assert logprobs is not None
        nll = float(-logprobs[held_out.mask].mean())
        return {"eval/nll": nll, "eval/perplexity": float(torch.tensor(nll).exp())}

    optimiser = Optimiser(model.trainable(), config.optim, config.fit.total_steps(len(data.groups)))
    guards = Guards(run, config.guards, tracker, [optimiser])
    checkpoints = Checkpoints(
        run, config.checkpoint, tracker, {"model": optimiser, "guards": guards}, {"model": model}, resume=config.resume
    )
    loss, hooks = nll_loss(config.aggregation), Hooks(evaluate)
    return fit(data, model.forward, loss, [optimiser], config.fit, tracker, hooks, seed=config.seed, checkpoints=checkpoints, guards=guards)
