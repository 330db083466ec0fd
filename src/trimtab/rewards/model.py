"""A trained reward model as a reward. It may have another tokenizer than the policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from trimtab.batch import Batch, observe
from trimtab.data.templates import Mode, Template
from trimtab.errors import ConfigError, RewardError
from trimtab.maths.ensembles import Reading, combine
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.types import Group, Score


class ModelReward:
    """r(x, y) of a Scorer, read at the response's last token.

    Where the policy's tokens mean the same to the scorer (`policy` is the policy's template, with the same fingerprint), they
    are read as they were sampled; otherwise the text is encoded anew.

    An ensemble's heads are combined as `reading` says (see `maths.ensembles.combine`); the parts then show every head's score
    (NAME/0, NAME/1, ...) and their standard deviation (NAME/sd).
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        name: str = "model",
        token_budget: int = 8192,
        policy: Template | None = None,
        reading: Reading = "mean",
        weights: Sequence[float] | None = None,
        uncertainty_weight: float = 0.0,
    ) -> None:
        self.scorer, self.name, self.token_budget = scorer, name, token_budget
        self.reading, self.uncertainty_weight = reading, uncertainty_weight
        self.same_tokens = policy is not None and policy.fingerprint == scorer.template.fingerprint
        if scorer.note.reads == "step":
            fix = "set segments={by: marker, score: probability}, or name a model trained with another loss.kind"
            raise ConfigError("this model judges steps, not responses", where=name, fix=fix)
        if weights is not None and len(weights) != scorer.heads:
            raise ConfigError(f"{len(weights)} weights for {scorer.heads} heads", where=name, fix="give one weight per head")
        self.weights = None if weights is None else torch.tensor(weights, dtype=torch.float64)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        template: Mode = "auto",
        token_budget: int = 8192,
        name: str | None = None,
        policy: Template | None = None,
        reading: Reading = "mean",
        weights: Sequence[float] | None = None,
        uncertainty_weight: float = 0.0,
    ) -> ModelReward:
        """Load a saved reward model."""
        scorer = Scorer.load(config, head="saved", template=template, trainable=False)
        return cls(
            scorer, name=name or Path(config.path).name, token_budget=token_budget, policy=policy, reading=reading, weights=weights,
            uncertainty_weight=uncertainty_weight,
        )  # fmt: skip

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        seen = tuple(group if self.same_tokens else self.scorer.encode(group, self.name) for group in groups)
        members = observe(Batch(seen), self.scorer.scores, token_budget=self.token_budget).members
        assert members is not None
        totals = combine(members.double(), self.reading, self.weights, self.uncertainty_weight)
        for total, (prompt, response) in zip(totals.tolist(), ((g.prompt, r) for g in groups for r in g.responses), strict=True):
            if not math.isfinite(total):
                said = {"prompt": prompt.as_text, "response": response.text, "tokens": list(response.tokens), "numbers": {self.name: []}}
                where, fix = f"response {response.text[:60]!r}", "try reward.dtype=float32"
                raise RewardError(f"reward model {self.name!r} gave {total}", where=where, fix=fix, samples=[said])
        flat = map(self._one, totals.tolist(), members.double().tolist())
        return [list(itertools.islice(flat, len(g.responses))) for g in groups]

    def _one(self, total: float, members: list[float]) -> Score:
        if len(members) == 1:
            return Score(total, {self.name: total})
        mean = sum(members) / len(members)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in members) / len(members))
        return Score(total, {self.name: total, **{f"{self.name}/{k}": r for k, r in enumerate(members)}, f"{self.name}/sd": deviation})
