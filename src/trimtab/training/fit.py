"""The loop of the supervised stages: the whole data set is one Batch, and every step updates on a few of its groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import Field

from trimtab.batch import Batch, LossFunction, Outputs
from trimtab.config import Config
from trimtab.data.cursor import Cursor
from trimtab.protocols import Tracker
from trimtab.training.checkpoint import Checkpoints, each_step
from trimtab.training.clock import Clock
from trimtab.training.guards import Guards, skipping
from trimtab.training.optimiser import Optimiser
from trimtab.training.update import update


class FitConfig(Config):
    """How long to train, on how much at a time."""

    batch_size: int = Field(16, gt=0, description="groups (prompts with their responses) per optimiser step")
    epochs: float = Field(1.0, gt=0, description="passes over the data, unless steps is set")
    steps: int | None = Field(None, gt=0, description="optimiser steps; overrides epochs")
    micro_batch_tokens: int = Field(2048, gt=0, description="packed tokens per forward and backward pass: lower needs less memory")
    eval_every: int | None = Field(None, gt=0, description="steps between evaluations on the held-out part (it is always done at the end)")

    def total_steps(self, groups: int) -> int:
        """Optimiser steps of the whole run."""
        return self.steps or max(1, round(self.epochs * groups / self.batch_size))


@dataclass(frozen=True)
class Hooks:
    """What a stage does now and then: measure on held-out data, and see a minibatch whole before it is cut.

    prepare: takes the minibatch of a step (counted from 0) before its update, and gives it back with further columns.
    """

    evaluate: Callable[[], dict[str, float]]
    prepare: Callable[[Batch, int], Batch] | None = None


def fit(
    data: Batch,
    forward: Callable[[Batch], Outputs],
    loss: LossFunction,
    optimisers: Sequence[Optimiser],
    config: FitConfig,
    tracker: Tracker,
    hooks: Hooks,
    *,
    seed: int,
    checkpoints: Checkpoints | None = None,
    guards: Guards | None = None,
) -> dict[str, float]:
    """Train for `config.total_steps` steps, from the newest checkpoint on if there is one; returns the metrics of the last step."""
    total = config.total_steps(len(data.groups))
    cursor = Cursor(len(data.groups), min(config.batch_size, len(data.groups)), seed)
    start = checkpoints.start() if checkpoints else 0
    tracker.event("training", steps=total, groups=len(data.groups), done=start)

    def one(step: int) -> dict[str, float]:
        clock = Clock()
        batch, raw = data.select(cursor.at(step)), dict[str, float]()
        with skipping(guards):
            if hooks.prepare is not None:
                with clock("prepare"):
                    batch = hooks.prepare(batch, step)
            raw = update(batch, forward, loss, optimisers, at=step, token_budget=config.micro_batch_tokens, clock=clock)
        metrics = {name: value for name, value in raw.items() if "/" in name}
        metrics |= {f"optim/{name}": raw[name] for name in ("grad_norm", "out_of_memory") if name in raw}
        if guards is not None and checkpoints is not None:
            guards.see(loss=raw.get("loss"))
            metrics |= guards.metrics()
        metrics |= {"optim/lr": optimisers[0].lr(step), "progress/epoch": cursor.epoch(step + 1), **clock.seconds}
        if step + 1 == total or (config.eval_every and (step + 1) % config.eval_every == 0):
            metrics |= hooks.evaluate()
        tracker.log(step, metrics)
        return metrics

    return each_step(one, start, total, checkpoints, guards if checkpoints else None)
