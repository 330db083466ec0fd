"""Rewards by rule: is the response right? Against a column of the prompt's row, by a pattern, or by a predicate in a sandbox."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from trimtab.config import Config
from trimtab.errors import ConfigError, RewardError
from trimtab.rewards.numerals import last_number
from trimtab.rewards.sandbox import Limits, Predicate, Sandbox, Verdict
from trimtab.types import Group, Prompt, Response, Score


class VerifierConfig(Config):
    """One rule."""

    kind: Literal["exact", "numeric", "regex", "python"] = Field(
        description="exact: the response is the answer; numeric: its last number is; regex: it contains a pattern; python: a predicate"
    )
    column: str = Field("answer", description="the column of the row that holds the answer, or a list of answers of which any will do")
    pattern: str | None = Field(None, description="of regex: a Python regular expression, searched anywhere in the response")
    code: str | None = Field(
        None,
        description="of python: 'file.py:name', or source text whose last function is taken; "
        "called as function(prompt, response, row), it returns true, false or a number",
    )
    ignore_case: bool = Field(False, description="of exact and regex: capitals and small letters are the same")
    ignore_space: bool = Field(True, description="of exact: space at the ends is dropped, any other run of space is one blank")
    absolute: float = Field(1e-6, ge=0, description="of numeric: numbers this far apart are equal")
    relative: float = Field(0.0, ge=0, description="of numeric: so are numbers this far apart as a share of the answer")
    right: float = Field(1.0, description="score of a right response")
    wrong: float = Field(0.0, description="score of a wrong response")
    failed: float = Field(0.0, description="of python: score where the predicate fails: hangs, uses too much, raises, returns no number")
    on_failure: Literal["score", "error"] = Field("score", description="of python: give the score `failed` and count it, or stop")
    seconds: float = Field(5.0, gt=0, description="of python: wall-clock seconds a call may take")
    cpu_seconds: int = Field(2, gt=0, description="of python: CPU seconds a call may take")
    memory_mb: int = Field(512, ge=64, description="of python: address space a call may use, in MiB")

    @model_validator(mode="after")
    def _complete(self) -> VerifierConfig:
        for kind, name in (("regex", "pattern"), ("python", "code")):
            if (self.kind == kind) != (getattr(self, name) is not None):
                raise ValueError(f"{name} goes with kind {kind}, and {kind} needs it; kind is {self.kind}")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is not a regular expression: {error}") from None
        return self


Rule = Callable[[str, Mapping[str, Any]], bool]


class RuleReward:
    """`right` or `wrong` for every response, by a rule on its text and its prompt's row."""

    def __init__(self, rule: Rule, *, name: str, right: float = 1.0, wrong: float = 0.0) -> None:
        self.rule, self.name, self.right, self.wrong = rule, name, right, wrong

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        return [[self._one(group.prompt, response) for response in group.responses] for group in groups]

    def _one(self, prompt: Prompt, response: Response) -> Score:
        try:
            total = self.right if self.rule(response.text, prompt.row) else self.wrong
        except RewardError as error:
            raise RewardError(f"reward {self.name!r}: {error.what}", where=f"prompt {prompt.as_text[:60]!r}", fix=error.fix) from None
        return Score(total, {self.name: total})


class PredicateReward:
    """A predicate's verdict on every response: `right`, `wrong`, or the number it returned; `failed` where it failed.

    Each call is a process of its own (`rewards.sandbox`). The part NAME_failed is 1 where a call failed, so its mean is the share
    of failures; `failures` counts them by cause.
    """

    def __init__(self, sandbox: Sandbox, config: VerifierConfig, *, name: str) -> None:
        self.sandbox, self.config, self.name = sandbox, config, name
        self.failures: dict[str, int] = {}

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        return [[self._one(group.prompt, response) for response in group.responses] for group in groups]

    def _one(self, prompt: Prompt, response: Response) -> Score:
        verdict = self.sandbox.call(prompt.as_text, response.text, dict(prompt.row))
        if verdict.failure is not None:
            self._count(verdict, prompt, response)
            total = self.config.failed
        elif isinstance(verdict.value, bool):
            total = self.config.right if verdict.value else self.config.wrong
        else:
            assert verdict.value is not None
            total = verdict.value
        return Score(total, {self.name: total, f"{self.name}_failed": float(verdict.failure is not None)})

    def _count(self, verdict: Verdict, prompt: Prompt, response: Response) -> None:
        assert verdict.failure is not None
        if self.config.on_failure == "error":
            raise RewardError(
                f"reward {self.name!r} failed ({verdict.failure}): {verdict.detail}",
                where=f"prompt {prompt.as_text[:60]!r}, response {response.text[:60]!r}",
                fix="mend the predicate, raise its limits, or set on_failure=score",
            )
        self.failures[verdict.failure] = self.failures.get(verdict.failure, 0) + 1

    def close(self) -> None:
        """End the worker process (collecting the reward, or leaving the program, ends it too)."""
        self.sandbox.close()


def make_verifier(config: VerifierConfig, *, name: str | None = None, where: str = "reward.verifier") -> RuleReward | PredicateReward:
    """The reward of a rule. Raises ConfigError for a predicate that cannot be read."""
    if config.kind == "python":
        assert config.code is not None
        predicate = read_predicate(config.code, where=f"{where}.code")
        limits = Limits(config.seconds, config.cpu_seconds, config.memory_mb)
        return PredicateReward(Sandbox(predicate, limits), config, name=name or predicate.name)
    rule = {"exact": exact, "numeric": numeric, "regex": regex}[config.kind](config)
    return RuleReward(rule, name=name or config.kind, right=config.right, wrong=config.wrong)


def exact(config: VerifierConfig) -> Rule:
    """The response is one of the answers, after normalising both."""

    def normal(text: str) -> str:
        text = " ".join(text.split()) if config.ignore_space else text
        return text.casefold() if config.ignore_case else text

    return lambda response, row: normal(response) in {normal(str(answer)) for answer in _answers(row, config.column)}


def regex(config: VerifierConfig) -> Rule:
    """The pattern is found in the response. A pattern with nested repeats can take exponential time: nothing limits it."""
    assert config.pattern is not None
    pattern = re.compile(config.pattern, re.IGNORECASE if config.ignore_case else 0)
    return lambda response, _: pattern.search(response) is not None


def numeric(config: VerifierConfig) -> Rule:
    """The response's last number (see `last_number`) is one of the answers: |x - a| <= absolute or <= relative |a|, exactly."""
    absolute, relative = Fraction(config.absolute), Fraction(config.relative)

    def rule(response: str, row: Mapping[str, Any]) -> bool:
        answers = [_number(answer, config.column) for answer in _answers(row, config.column)]
        found = last_number(response)
        return found is not None and any(abs(found - a) <= max(absolute, relative * abs(a)) for a in answers)

    return rule


def _answers(row: Mapping[str, Any], column: str) -> list[Any]:
    if row.get(column) is None:
        raise RewardError(
            f"the row has no column {column!r}", fix=f"set reward.verifier.column to one of: {', '.join(row) or 'none, the rows are bare'}"
        )
    answers = row[column]
    return answers if isinstance(answers, list) else [answers]


def _number(answer: Any, column: str) -> Fraction:
    """A row's answer as a number: a number, or text read as a response is."""
    text = repr(answer) if isinstance(answer, int | float) and not isinstance(answer, bool) else answer
    found = last_number(text) if isinstance(text, str) else None
    if found is None:
        raise RewardError(f"the answer {answer!r} in column {column!r} is not a number", fix="correct the row, or use kind exact")
    return found


def read_predicate(code: str, *, where: str) -> Predicate:
    """The predicate named by "file.py:name", or the last function of source text. Only read here, never run."""
    if "\n" in code or "def " in code:
        source, name, file, folder = code, None, "<code>", ""
    else:
        place, _, name = code.rpartition(":")
        path = Path(place)
        if not name or not path.is_file():
            raise ConfigError(f"there is no file {place!r}", where=where, fix="write file.py:name, or source text with a function")
        source, file, folder = path.read_text(encoding="utf-8"), str(path), str(path.resolve().parent)
    try:
        functions = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    except SyntaxError as error:
        raise ConfigError(f"the predicate is not Python: {error.msg} (line {error.lineno})", where=where, fix="correct it") from None
    if not functions or name not in (None, *functions):
        raise ConfigError(f"there is no function {name or ''}".rstrip(), where=where, fix=f"it has: {', '.join(functions) or 'none'}")
    return Predicate(source, name or functions[-1], file, folder)
