"""Rewards for the pieces of a response, placed where each piece ends. Their sum is the response's reward."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator

from trimtab.batch import Batch, observe
from trimtab.config import Config
from trimtab.data.segments import SENTENCE, cut_after, cut_every, last_tokens
from trimtab.data.templates import Mode, Template
from trimtab.errors import ConfigError
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.protocols import Reward
from trimtab.types import Group, Response, Score


class SegmentsConfig(Config):
    """How responses are cut, and how the pieces are scored."""

    by: Literal["sentence", "length", "marker"] = Field("sentence", description="cut after sentences, every so many tokens, or at a marker")
    length: int = Field(16, gt=0, description="by=length: tokens of a piece")
    marker: str = Field(r"\n+", description="by=marker: a regular expression; a piece ends behind each match (steps: a line each)")
    score: Literal["difference", "alone", "log-probability", "probability"] = Field(
        "difference",
        description="difference: what the piece adds to the score of everything before it; alone: the reward of the piece by itself; "
        "log-probability, probability: what a model trained with loss.kind=process or outcome says at the piece's end",
    )

    @field_validator("marker")
    @classmethod
    def _pattern(cls, marker: str) -> str:
        try:
            re.compile(marker)
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
        return marker


def segment_ends(response: Response, template: Template, config: SegmentsConfig) -> list[int]:
    """The last token of every piece of a response; the last piece has its EOS. `template` is that of the response's tokens."""
    count = len(response.tokens)
    if config.by == "length":
        ends = cut_every(max(1, count - (not response.truncated)), config.length)
    else:
        pattern = SENTENCE if config.by == "sentence" else config.marker
        ends = last_tokens(template, response.tokens, cut_after(response.text, pattern))
    return [*(end for end in sorted(set(ends[:-1])) if end < count - 1), count - 1]


def prefix(response: Response, end: int, template: Template) -> Response:
    """The response up to and including a token, as one that was cut off there; the whole response if that is its last token."""
    if end == len(response.tokens) - 1:
        return response
    tokens = response.tokens[: end + 1]
    return Response(tokens, template.decode(tokens), truncated=True, mask=None if response.mask is None else response.mask[: end + 1])


class SegmentedReward:
    """Another reward, given piece by piece.

    difference: r_k = s(y_1..k) - s(y_1..k-1), s(nothing) = 0: the pieces add up to the member's own score of the response, and
                differ only in when it is given. A piece is scored as if the response were cut off behind it.
    alone:      r_k = s(piece k): the total is the sum, which longer responses have more terms of.

    Where the member failed on a piece, the response has failed: its total is `failed`.
    """

    def __init__(self, member: Reward, template: Template, config: SegmentsConfig, *, failed: float = math.nan) -> None:
        if config.score not in ("difference", "alone"):
            raise ConfigError(
                f"segments.score={config.score} needs a model", where="reward.segments", fix="set score=difference or score=alone"
            )
        self.member, self.template, self.config, self.failed = member, template, config, failed
        self.name: str = member.name

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        ends = [[segment_ends(r, self.template, self.config) for r in group.responses] for group in groups]
        cut = self._prefix_group if self.config.score == "difference" else self._piece_group
        flat = iter(self.member.score([cut(g, i, e) for g, row in zip(groups, ends, strict=True) for i, e in enumerate(row)]))
        together = self._differences if self.config.score == "difference" else self._sum
        return [
            [self._failed(scores) or together(scores, e) for e, scores in zip(row, itertools.islice(flat, len(row)), strict=True)]
            for row in ends
        ]

    def _failed(self, scores: list[Score]) -> Score | None:
        failure = next((score.failure for score in scores if score.failure is not None), None)
        return None if failure is None else Score(self.failed, {}, failure=failure)

    def _prefix_group(self, group: Group, index: int, ends: list[int]) -> Group:
        return Group(group.prompt, tuple(prefix(group.responses[index], end, self.template) for end in ends))

    def _piece_group(self, group: Group, index: int, ends: list[int]) -> Group:
        response = group.responses[index]
        starts = [0, *(end + 1 for end in ends)]
        edges = [0, *(len(self.template.decode(response.tokens[: end + 1])) for end in ends[:-1]), len(response.text)]
        pieces = zip(pairwise(starts), pairwise(edges), strict=True)
        return Group(
            group.prompt,
            tuple(
                Response(response.tokens[a:b], response.text[c:d], truncated=response.truncated or b < len(response.tokens))
                for (a, b), (c, d) in pieces
            ),
        )

    def _differences(self, scores: list[Score], ends: list[int]) -> Score:
        steps = [later - earlier for earlier, later in pairwise([0.0, *(score.total for score in scores)])]
        return Score(scores[-1].total, scores[-1].parts, tuple(zip(ends, steps, strict=True)))

    def _sum(self, scores: list[Score], ends: list[int]) -> Score:
        names = dict.fromkeys(name for score in scores for name in score.parts)
        parts = {name: sum(score.parts.get(name, 0.0) for score in scores) for name in names}
        placed = tuple(zip(ends, (score.total for score in scores), strict=True))
        return Score(sum(score.total for score in scores), parts, placed)


class ProcessReward:
    """What a judge of steps says at the end of each: r_k = p(right so far), or log p, p = sigma(its score there).

    The sum is the response's reward; the part NAME/lowest is the probability of the weakest step. Sources: Uesato et al. 2022;
    Lightman et al. 2023 (whose score of a solution is the product: the sum of the log-probabilities).
    """

    def __init__(self, scorer: Scorer, template: Template, config: SegmentsConfig, *, name: str, token_budget: int = 8192) -> None:
        if config.score not in ("log-probability", "probability"):
            raise ConfigError(
                "a judge of steps gives probabilities", where="reward.segments", fix="set score=probability or log-probability"
            )
        if scorer.note.reads == "response":
            fix = "use one trained with loss.kind=process or outcome, or set segments.score=difference"
            raise ConfigError("this model scores whole responses, not steps", where=name, fix=fix)
        self.scorer, self.template, self.config, self.name, self.token_budget = scorer, template, config, name, token_budget
        self.same_tokens = template.fingerprint == scorer.template.fingerprint

    @classmethod
    def load(
        cls, model: ModelConfig, policy: Template, config: SegmentsConfig, *, template: Mode, name: str | None, token_budget: int
    ) -> ProcessReward:
        """Load a saved judge of steps."""
        scorer = Scorer.load(model, head="saved", template=template, trainable=False)
        return cls(scorer, policy, config, name=name or Path(model.path).name, token_budget=token_budget)

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        batch = Batch(tuple(group if self.same_tokens else self.scorer.encode(group, self.name) for group in groups))
        logits = observe(batch, self.scorer.token_scores, token_budget=self.token_budget).token_scores
        assert logits is not None
        read = (r for group in batch.groups for r in group.responses)
        each = iter(logits.double().split(batch.lengths))
        return [[self._one(response, next(read), next(each)) for response in group.responses] for group in groups]

    def _said(self, text: str) -> str:
        """A text without the marker and white space at its end: in training, too, a step is judged at the end of its own text."""
        bare = re.sub(f"(?:{self.config.marker})$", "", text) if self.config.by == "marker" else text
        return bare.rstrip()

    def _one(self, response: Response, read: Response, logits: torch.Tensor) -> Score:
        """`read` is the response in the judge's tokens, whose scores `logits` are."""
        ends = segment_ends(response, self.template, self.config)
        shift = len(read.text) - len(response.text)  # a space that the judge's template puts before an answer
        characters = [len(self._said(self.template.decode(response.tokens[: end + 1]))) + shift for end in ends]
        judged = logits[last_tokens(self.scorer.template, read.tokens, characters)]
        rewards = torch.nn.functional.logsigmoid(judged) if self.config.score == "log-probability" else torch.sigmoid(judged)
        total = float(rewards.sum())
        parts = {self.name: total, f"{self.name}/lowest": float(torch.sigmoid(judged).min())}
        return Score(total, parts, tuple(zip(ends, rewards.tolist(), strict=True)))
