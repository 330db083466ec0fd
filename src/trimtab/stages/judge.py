"""AI feedback: a language model says which of two responses is better; every pair is asked in both orders.

    p(a, b) = P(label 1 | a shown first) / [P(label 1 | ...) + P(label 2 | ...)],      preference(a over b) = [p(a, b) + 1 - p(b, a)] / 2

preference(a over b) + preference(b over a) = 1 exactly. A judge that only looks at the position says 1/2. Source: Bai et al. 2022
(Constitutional AI); Lee et al. 2023 (RLAIF), where both orders are averaged; Zheng et al. 2023 on position bias.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor

from trimtab.batch import Batch, observe
from trimtab.config import Config
from trimtab.data.readers import read_rows
from trimtab.data.records import write_jsonl
from trimtab.data.templates import Mode, Template, turns_of
from trimtab.errors import DataError, ModelError
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.types import Group, Message, Prompt, Response

QUESTION = """Which of two responses to a prompt is better: more helpful, honest and harmless?

Prompt:
{prompt}

Response {first}:
{a}

Response {second}:
{b}

Answer with one letter, {first} or {second}. The better response is"""


class JudgeConfig(Config):
    """A recipe of `trimtab judge`."""

    samples: str = Field(description="JSON lines written by `trimtab sample` with output and n of at least 2")
    output: str = Field(description="where to write the comparisons, as JSON lines")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the judge")
    template: Mode = Field("auto", description="how the judge is asked; chat: as a user's turn; plain: as text; auto: chat if it can")
    question: str = Field(
        QUESTION, description="what it is asked: {prompt}, {a} and {b} are filled in, {first} and {second} are the labels"
    )
    labels: tuple[str, str] = Field(("A", "B"), description="the two answers; each must be one token of the judge")
    soft: bool = Field(True, description="write the judge's probability that `chosen` is better as the column `probability`")
    confidence: float = Field(0.5, ge=0.5, lt=1, description="leave out pairs where the judge's probability for either is not above this")
    pairs: Literal["all", "neighbours"] = Field("all", description="which responses to a prompt are compared: all pairs, or 1-2, 3-4, ...")
    on_long: Literal["error", "skip"] = Field("error", description="a pair that exceeds the judge's context: stop, or leave it out")
    tokens_per_batch: int = Field(8192, gt=0, description="packed tokens the judge reads at once")

    @field_validator("question")
    @classmethod
    def _shows_everything(cls, question: str) -> str:
        missing = [name for name in ("{prompt}", "{a}", "{b}") if name not in question]
        if missing:
            raise ValueError(f"does not show {' and '.join(missing)}")
        return question


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt, in the order they were written."""

    prompt: str | tuple[Message, ...]
    texts: tuple[str, str]
    truncated: tuple[bool, bool]


@dataclass(frozen=True)
class Judged:
    """What the judge says of pairs; columns run over the pairs.

    preference: P(the first response is better), averaged over both orders.
    first:      P(the response shown first is better), in the two orders: their mean is 1/2 for a judge without position bias.
    mass:       the probability that the judge gives to either label at all, mean of the two orders.
    """

    preference: Float[Tensor, " pairs"]
    first: Float[Tensor, "pairs 2"]
    mass: Float[Tensor, " pairs"]

    def summary(self) -> dict[str, float]:
        """position_bias: mean P(shown first) - 1/2; flipped: share of pairs where the verdict goes with the position."""
        flipped = (self.first[:, 0] > 0.5) == (self.first[:, 1] > 0.5)
        return {
            "position_bias": float(self.first.mean() - 0.5),
            "flipped": float(flipped.double().mean()),
            "confidence": float(torch.maximum(self.preference, 1 - self.preference).mean()),
            "label_mass": float(self.mass.mean()),
        }


def judge(config: JudgeConfig) -> dict[str, float]:
    """Judge the samples and write comparisons; prints and returns how many there are, and how far the judge can be trusted."""
    pairs, alike = read_pairs(config.samples, config.pairs)
    model = LanguageModel.load(config.model, template=config.template, trainable=False)
    asked = ask(pairs, model.template, config)
    fits = [max(group.token_count for group in both) <= model.context for both in asked]
    if not all(fits) and config.on_long == "error":
        at = fits.index(False)
        raise DataError(
            f"a question of {max(group.token_count for group in asked[at])} tokens exceeds the judge's context of {model.context}",
            where=f"prompt {str(pairs[at].prompt)[:60]!r}", fix="set on_long=skip, or take a judge with a longer context",
        )  # fmt: skip
    pairs = [pair for pair, fit in zip(pairs, fits, strict=True) if fit]
    asked = [both for both, fit in zip(asked, fits, strict=True) if fit]
    if not pairs:
        raise DataError("there is no pair to judge", where=config.samples, fix="sample with n of at least 2, and shorter than the context")
    judged = compare(model, asked, token_budget=config.tokens_per_batch)
    rows = comparison_rows(pairs, judged.preference.tolist(), soft=config.soft, confidence=config.confidence)
    write_jsonl(config.output, rows)
    result = {"pairs": float(len(rows)), "alike": float(alike), "too_long": float(fits.count(False))}
    result |= {"unsure": float(len(pairs) - len(rows)), **judged.summary()}
    print(
        f"judged {len(pairs)} pairs, wrote {len(rows)} ({alike} alike, {fits.count(False)} too long, {len(pairs) - len(rows)} unsure); "
        f"position bias {result['position_bias']:+.3f}, verdict goes with the position in {result['flipped']:.1%}, "
        f"mean confidence {result['confidence']:.3f}, probability of either label {result['label_mass']:.3f}"
    )
    return result


def read_pairs(path: str, which: Literal["all", "neighbours"]) -> tuple[list[Pair], int]:
    """Pairs of different responses to the same prompt, and how many pairs were left out because both are the same text."""
    pairs, alike = list[Pair](), 0
    for row in read_rows(path):
        prompt, texts, truncated = _responses(row.values, row.place)
        count = len(texts)
        chosen = combinations(range(count), 2) if which == "all" else ((i, i + 1) for i in range(0, count - 1, 2))
        for i, j in chosen:
            if texts[i] == texts[j]:
                alike += 1
            else:
                pairs.append(Pair(prompt, (texts[i], texts[j]), (truncated[i], truncated[j])))
    return pairs, alike


def ask(pairs: Sequence[Pair], template: Template, config: JudgeConfig) -> list[tuple[Group, Group]]:
    """Every pair as two groups, one for each order: the question, and the two labels as its one-token responses."""
    return [(_question(p, p.texts, template, config), _question(p, p.texts[::-1], template, config)) for p in pairs]


def compare(model: LanguageModel, asked: Sequence[tuple[Group, Group]], *, token_budget: int) -> Judged:
    """Read the labels' probabilities, all from one packed forward pass per batch, and average over the orders."""
    batch = Batch(tuple(group for both in asked for group in both))
    logprobs = observe(batch, model.forward, token_budget=token_budget).logprobs
    assert logprobs is not None
    labels = logprobs.double().view(len(asked), 2, 2)  # pair, order, label
    first = torch.softmax(labels, dim=2)[:, :, 0]
    return Judged((first[:, 0] + 1 - first[:, 1]) / 2, first, labels.exp().sum(2).mean(1))


def comparison_rows(pairs: Sequence[Pair], preference: Sequence[float], *, soft: bool, confidence: float) -> list[dict[str, Any]]:
    """Rows that the reward and preference stages read: the likelier better response as `chosen`; ties are left out."""
    rows = []
    for pair, probability in zip(pairs, preference, strict=True):
        sure = max(probability, 1 - probability)
        if sure <= confidence:
            continue
        order = (0, 1) if probability > 0.5 else (1, 0)
        row: dict[str, Any] = {"prompt": pair.prompt if isinstance(pair.prompt, str) else [dict(turn) for turn in pair.prompt]}
        for name, i in zip(("chosen", "rejected"), order, strict=True):
            row[name] = pair.texts[i]
            if pair.truncated[i]:
                row[f"{name}_truncated"] = True
        rows.append(row | ({"probability": sure} if soft else {}))
    return rows


def _question(pair: Pair, shown: tuple[str, ...], template: Template, config: JudgeConfig) -> Group:
    first, second = config.labels
    given = Prompt((0,), pair.prompt).as_text
    fields = {"prompt": given, "a": shown[0], "b": shown[1], "first": first, "second": second}
    # in one pass, so that a response which contains "{b}" is shown as it is
    text = re.sub(r"\{(prompt|a|b|first|second)\}", lambda match: fields[match[1]], config.question)
    prompt = template.prompt(text)
    labels = tuple(Response((_label(template, prompt, label),), label) for label in config.labels)
    if labels[0].tokens == labels[1].tokens:
        raise ModelError(f"the labels {first!r} and {second!r} begin with the same token", where="labels", fix="choose other labels")
    return Group(prompt, labels)


def _label(template: Template, prompt: Prompt, label: str) -> int:
    """The token of a label where the answer begins; in plain text after a blank, if the two make one token."""
    blank = template.mode == "plain" and isinstance(prompt.text, str) and not prompt.text[-1:].isspace()
    for text in (f" {label}", label) if blank else (label,):
        tokens = template.response(prompt, text, truncated=True).tokens
        if len(tokens) == 1:
            return tokens[0]
    raise ModelError(f"the label {label!r} is {len(tokens)} tokens for this judge", where="labels", fix="choose labels of one token")


def _responses(row: Any, place: str) -> tuple[str | tuple[Message, ...], list[str], list[bool]]:
    fix = "write it with trimtab sample output=..."
    for name in ("prompt", "responses"):
        if row.get(name) is None:
            raise DataError(f"there is no column {name!r}", where=place, fix=fix)
    prompt, texts = row["prompt"], row["responses"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DataError("expected a list of texts", where=f"{place}, responses", fix=fix)
    truncated = row.get("truncated") or [False] * len(texts)
    if not isinstance(truncated, list) or len(truncated) != len(texts):
        raise DataError(f"expected {len(texts)} entries", where=f"{place}, truncated", fix=fix)
    return (prompt if isinstance(prompt, str) else turns_of(prompt)), texts, truncated
