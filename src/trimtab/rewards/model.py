"""A trained reward model as a reward. It may have another tokenizer than the policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from trimtab.batch import Batch, observe
from trimtab.data.templates import Mode, Template
from trimtab.errors import DataError, RewardError
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.types import Group, Score


class ModelReward:
    """r(x, y) of a Scorer, read at the response's last token.

    Where the policy's tokens mean the same to the scorer (`policy` is the policy's template, with the same fingerprint), they
    are read as they were sampled; otherwise the text is encoded anew.
    """

    def __init__(self, scorer: Scorer, *, name: str = "model", token_budget: int = 8192, policy: Template | None = None) -> None:
        self.scorer, self.name, self.token_budget = scorer, name, token_budget
        self.same_tokens = policy is not None and policy.fingerprint == scorer.template.fingerprint

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        template: Mode = "auto",
        token_budget: int = 8192,
        name: str | None = None,
        policy: Template | None = None,
    ) -> ModelReward:
        """Load a saved reward model."""
        scorer = Scorer.load(config, head="saved", template=template, trainable=False)
        return cls(scorer, name=name or Path(config.path).name, token_budget=token_budget, policy=policy)

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        seen = tuple(self._encode(group) for group in groups)
        scores = observe(Batch(seen), self.scorer.scores, token_budget=self.token_budget).scores
        assert scores is not None
        for total, response in zip(scores.tolist(), (r for g in groups for r in g.responses), strict=True):
            if not math.isfinite(total):
                raise RewardError(
                    f"reward model {self.name!r} gave {total}", where=f"response {response.text[:60]!r}", fix="try reward.dtype=float32"
                )
        flat = iter(scores.tolist())
        return [[Score(total, {self.name: total}) for total in itertools.islice(flat, len(g.responses))] for g in groups]

    def _encode(self, group: Group) -> Group:
        if self.same_tokens:
            return group
        template = self.scorer.template
        try:
            prompt = template.prompt(group.prompt.text, group.prompt.row)
            answers = [(r.text, r.truncated and bool(r.text)) for r in group.responses]  # nothing at all is written as an end of turn
            return Group(prompt, tuple(template.response(prompt, text, truncated=cut) for text, cut in answers))
        except DataError as error:
            raise RewardError(
                f"reward model {self.name!r} cannot read a sample: {error.what}",
                where=f"prompt {group.prompt.as_text[:60]!r}",
                fix="use a reward model with the policy's tokenizer and template",
            ) from error
