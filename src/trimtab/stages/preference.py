"""Learning from preferences without a reward model: the policy is its own, r = beta (log pi - log pi_ref) + constant.

One stage for every loss; what differs between them is in `algorithms/preferences/`. Where the reference is the starting point,
its log-probabilities are computed once, before training; where it moves, for every minibatch; where there is none, never.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from trimtab.algorithms import PREFERENCES
from trimtab.batch import Batch, Counts, Outputs, observe
from trimtab.data.records import DataConfig, load_comparisons
from trimtab.errors import DataError
from trimtab.maths.statistics import wilson_interval
from trimtab.models import reference_cache
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.models.reference import MovingReference
from trimtab.models.reference_cache import Found, ReferenceCache
from trimtab.protocols import Tracker
from trimtab.stages.common import StageConfig, check_lengths, comparison_batch, recipe_type
from trimtab.training import finite
from trimtab.training.checkpoint import Checkpoints
from trimtab.training.fit import FitConfig, Hooks, fit
from trimtab.training.guards import Guards
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.training.update import Ahead
from trimtab.types import Comparison, Group


class PreferenceConfig(StageConfig):
    """A recipe of learning from preferences; `algorithm` holds the settings of the loss that the command names."""

    model: ModelConfig = Field(default_factory=ModelConfig, description="the policy; as it is at the start, it is the reference too")
    reference_cache: str | None = Field(
        "default",
        description="folder in which a frozen reference's log-probabilities are kept, so that the next run on this model and data reads "
        "them; default: beside trimtab's other caches ($TRIMTAB_CACHE); null: compute them anew",
    )
    data: DataConfig = Field(description="comparisons: chosen and rejected, rankings or ratings (all pairs are used), or labels")
    fit: FitConfig = Field(default_factory=FitConfig)
    optim: OptimConfig = Field(default_factory=lambda: OptimConfig(lr=1e-6))


@cache
def preference_config(name: str) -> type[PreferenceConfig]:
    """The recipe type of one preference loss."""
    return recipe_type(name, PreferenceConfig, PREFERENCES[name].load().Config)  # type: ignore[no-any-return]


def preference(name: str, config: Any, run: Path, tracker: Tracker) -> dict[str, float]:
    """Train a policy on preferences with the loss `name`; returns the last metrics."""
    model = LanguageModel.load(config.model, template=config.data.template)
    comparisons = load_comparisons(config.data, model.template)
    comparisons.report(tracker)
    check_lengths([c.group for c in (*comparisons.records, *comparisons.holdout)], model.context, "a comparison")
    cache = reference_cache.folder(config.reference_cache)
    learner = PreferenceLearning(name, config, model, comparisons.records, comparisons.holdout, tracker, cache)
    return learner.fit(run, tracker)


@dataclass(frozen=True)
class Judged:
    """Judged responses, and for every group the same prompt with a response to another one (where a loss needs it)."""

    batch: Batch
    mismatched: Batch | None = None


class PreferenceLearning:
    """A loss, a model and the data, put together once."""

    def __init__(
        self,
        name: str,
        config: Any,
        model: LanguageModel,
        records: Sequence[Comparison],
        holdout: Sequence[Comparison],
        tracker: Tracker,
        cache: Path | None = None,
    ) -> None:
        self.config, self.model, self.budget = config, model, config.fit.micro_batch_tokens
        self.algorithm = PREFERENCES[name].load()(config.algorithm, name)
        self.forward = Ahead(model.forward)
        frozen = self.algorithm.reference.role == "frozen"
        self.moving = MovingReference(model) if self.algorithm.reference.role in ("synced", "ema") else None
        kept, held = (usable(part, self.algorithm.data) for part in (records, holdout))
        if len(kept) < len(records):
            tracker.event("left out", comparisons=len(records) - len(kept), reason="nothing in them is better than something else")
        check_enough(kept, self.algorithm.data, name)
        start, threshold = time.perf_counter(), mean_rating(kept)
        self.kept, self.found = ReferenceCache(cache, model) if cache and frozen else None, list[Found]()
        self.data, self.held_out = (self._judged(part, kept, threshold) for part in (kept, held))
        if frozen:
            tracker.event("reference", **_told(self.found), seconds=time.perf_counter() - start)

    def fit(self, run: Path, tracker: Tracker) -> dict[str, float]:
        """Train; returns the last metrics."""
        config, data, model = self.config, self.data.batch, self.model
        optimiser = Optimiser(model.trainable(), config.optim, config.fit.total_steps(len(data.groups)))
        moving: dict[str, Any] = {"reference": self.moving} if self.moving else {}
        guards = Guards(run, config.guards, tracker, [optimiser])
        parts = {"model": optimiser, "algorithm": self.algorithm, "guards": guards, **moving}
        checkpoints = Checkpoints(run, config.checkpoint, tracker, parts, {"model": model, **moving}, resume=config.resume)
        hooks, loss = Hooks(self.evaluate, self.prepare), self.algorithm.loss
        return fit(
            data, self.forward, loss, [optimiser], config.fit, tracker, hooks, seed=config.seed, checkpoints=checkpoints, guards=guards
        )

    def prepare(self, batch: Batch, step: int) -> Batch:
        """Before an update: move the reference if it is time, and let the loss see the minibatch whole."""
        if self.moving is not None and step:
            self.moving.follow(self.algorithm.reference, step)
        return self._ready(Judged(batch, self.data.mismatched), training=True)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Loss and accuracy on the held-out part, with a Wilson 95 % interval."""
        if not self.held_out.batch.groups:
            return {}
        batch = self._ready(self.held_out, training=False)
        if "logprobs_now" not in batch.tokens:
            batch = batch.with_tokens(logprobs_now=self._look(batch))
        counts, loss, margin, right = Counts.of(batch), 0.0, 0.0, []
        for piece in batch.micro_batches(self.budget):
            part = self.algorithm.loss(Outputs(piece.tokens["logprobs_now"]), piece, counts)
            loss, margin = loss + float(part.value), margin + float(part.means["train/margin"])
            right.append(self.algorithm.correct(piece.tokens["logprobs_now"], piece))
        agreed = torch.cat(right)
        low, high = wilson_interval(int(agreed.sum()), len(agreed))
        accuracy = {"eval/accuracy": float(agreed.double().mean()), "eval/accuracy_low": low, "eval/accuracy_high": high}
        return {**accuracy, "eval/margin": margin, "eval/loss": loss}

    def _judged(self, comparisons: Sequence[Comparison], others: Sequence[Comparison], threshold: float) -> Judged:
        """The batch of some comparisons; responses to other prompts come from `others`."""
        if not comparisons:
            return Judged(Batch(()))
        batch = comparison_batch(comparisons)
        label = [x for c in comparisons for x in desirability(c, threshold)]
        sure = torch.tensor([c.probability for c in comparisons for _ in c.scores], dtype=torch.float64)
        batch = batch.with_responses(desirable=torch.tensor(label, dtype=torch.float64), probability=sure, row=batch.group_of_response)
        mismatched = None
        if self.algorithm.needs_mismatched:
            mixed = mismatch([c.group for c in comparisons], [c.group for c in others])
            check_lengths(mixed, self.model.context, "a prompt with the response to another")
            mismatched = Batch(tuple(mixed))
        if self.algorithm.reference.role == "frozen":
            batch = self._against_start(batch)
            mismatched = mismatched and self._against_start(mismatched)
        return Judged(batch, mismatched)

    def _ready(self, judged: Judged, *, training: bool) -> Batch:
        """A batch with the columns its loss needs."""
        batch, others = self._against(judged.batch), None
        if judged.mismatched is not None:
            rows = dict.fromkeys(zip(batch.group_of_response.tolist(), batch.responses["row"].tolist(), strict=True))
            others = self._against(judged.mismatched.select([row for _, row in rows]))
            others = others.with_tokens(logprobs_now=self._look(others))
        if self.algorithm.needs_own and training:
            now = self.forward.look(batch, token_budget=self.budget)
            assert now.logprobs is not None
            batch = batch.with_tokens(logprobs_now=now.logprobs)
        elif self.algorithm.needs_own:
            batch = batch.with_tokens(logprobs_now=self._look(batch))
        if training:  # before the loss takes these numbers into its running statistics
            finite.check(batch, self.budget)
        prepared: Batch = self.algorithm.prepare(batch, others, training=training)
        return prepared

    def _against_start(self, batch: Batch) -> Batch:
        """With the log-probabilities of the policy as it starts, from disk if they are there."""
        if self.kept is None:
            return batch.with_tokens(logprobs_ref=self._look(batch))
        column, found = self.kept.column(batch, self.budget, lambda: self._look(batch))
        self.found.append(found)
        return batch.with_tokens(logprobs_ref=column)

    def _against(self, batch: Batch) -> Batch:
        """With the log-probabilities of a reference that moves; those of a fixed one are there already."""
        return batch if self.moving is None else batch.with_tokens(logprobs_ref=self._look(batch, self.moving))

    def _look(self, batch: Batch, model: LanguageModel | MovingReference | None = None) -> Tensor:
        logprobs = observe(batch, (model or self.model).forward, token_budget=self.budget).logprobs
        assert logprobs is not None
        return logprobs


def _told(found: Sequence[Found]) -> dict[str, str]:
    """Where the reference's log-probabilities came from, in words."""
    said = {"logprobs": "read from cache" if found and set(found) == {"read"} else "computed"}
    if "damaged" in found:
        said["cache"] = "an entry was damaged: it was computed again and replaced"
    elif "not kept" in found:
        said["cache"] = "nothing was kept: the folder cannot be written"
    return said


def usable(comparisons: Sequence[Comparison], data: str) -> list[Comparison]:
    """For pairs, those in which something is better than something else; for labels, all."""
    return [c for c in comparisons if data == "labels" or c.pairs()]


def check_enough(comparisons: Sequence[Comparison], data: str, name: str) -> None:
    """Refuse data that a loss can learn nothing from."""
    if not comparisons:
        raise DataError(
            f"{name} learns from pairs, and no prompt has two responses of which one is better",
            where="data",
            fix="give pairs or rankings; for single responses with a label or rating use kto, bco or aot_unpaired",
        )
    if data == "labels":
        threshold = mean_rating(comparisons)
        kinds = {x for c in comparisons for x in desirability(c, threshold)}
        if not kinds >= {0.0, 1.0}:
            only = "desirable" if 1.0 in kinds else "undesirable"
            raise DataError(
                f"{name} tells desirable from undesirable responses, and all are {only}",
                where="data",
                fix="give responses of both kinds; for good examples alone use sft",
            )


def mean_rating(comparisons: Sequence[Comparison]) -> float:
    """The mean of all ratings: what is above it counts as desirable."""
    ratings = [score for c in comparisons if c.kind == "rating" for score in c.scores]
    return sum(ratings) / len(ratings) if ratings else 0.0


def desirability(comparison: Comparison, threshold: float) -> list[float]:
    """1 (desirable), 0 (not) or 0.5 (no opinion) for every response.

    Labels are taken as they are, and a solution is as good as its steps. A rating is held against `threshold`; a response of a
    pair or ranking against the middle of its own prompt's.
    """
    if comparison.kind in ("binary", "process"):
        middle = 0.5
    elif comparison.kind == "rating":
        middle = threshold
    else:
        middle = sum(comparison.scores) / len(comparison.scores)
    return [0.5 + 0.5 * ((score > middle) - (score < middle)) for score in comparison.scores]


def mismatch(groups: Sequence[Group], others: Sequence[Group]) -> list[Group]:
    """Every prompt with one response to another prompt, the next one in `others`. Raises DataError if there is no other prompt."""
    mixed = []
    for i, group in enumerate(groups):
        following = (others[(i + 1 + k) % len(others)] for k in range(len(others)))
        other = next((o for o in following if o.prompt.tokens != group.prompt.tokens), None)
        if other is None:
            raise DataError(
                "all responses are to the same prompt, and the KL is estimated from responses to other prompts",
                where="data",
                fix="give at least two prompts, or use bco or aot_unpaired",
            )
        mixed.append(Group(group.prompt, (other.responses[i % len(other.responses)],)))
    return mixed
