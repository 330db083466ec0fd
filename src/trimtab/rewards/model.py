"""A trained reward model as a reward. It may have another tokenizer than the policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from trimtab.batch import Batch, observe
from trimtab.errors import RewardError
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.types import Group, Score


class ModelReward:
    """r(x, y) of a Scorer, read at the response's last token."""

    def __init__(self, scorer: Scorer, *, name: str = "model", token_budget: int = 8192) -> None:
        self.scorer, self.name, self.token_budget = scorer, name, token_budget

    @classmethod
    def load(
        cls, config: ModelConfig, *, template: Literal["auto", "chat", "plain"] = "auto", token_budget: int = 8192, name: str | None = None
    ) -> ModelReward:
        """Load a saved reward model."""
        scorer = Scorer.load(config, head="saved", template=template, trainable=False)
        return cls(scorer, name=name or Path(config.path).name, token_budget=token_budget)

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        seen = tuple(self._encode(group) for group in groups)
        scores = observe(Batch(seen), self.scorer.scores, token_budget=self.token_budget).scores
        assert scores is not None
        for total, response in zip(scores.tolist(), (r for g in groups for r in g.responses), strict=True):
            if not math.isfinite(total):
                raise RewardError(f"reward model {self.name!r} gave {total}", where=f"response {response.text[:60]!r}", fix="try reward.dtype=float32")
        flat = iter(scores.tolist())
        return [[Score(total, {self.name: total}) for total in itertools.islice(flat, len(g.responses))] for g in groups]

    def _encode(self, group: Group) -> Group:
        """The group in the reward model's own tokens, from the text: its tokenizer and chat template may differ."""
        template = self.scorer.template
        prompt = template.prompt(group.prompt.text, group.prompt.row)
        return Group(prompt, tuple(template.response(prompt, r.text, truncated=r.truncated) for r in group.responses))
