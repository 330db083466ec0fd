"""From data files to records (prompts, demonstrations, comparisons) and back. Nothing is dropped in silence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import Field, field_validator

from trimtab import snapshot
from trimtab.config import Config
from trimtab.data import shapes
from trimtab.data.readers import Row, read_rows
from trimtab.data.shapes import Columns, Kind, Shape, Turns
from trimtab.data.templates import Mode, Template
from trimtab.errors import ConfigError, DataError
from trimtab.protocols import Tracker
from trimtab.types import Comparison, Group, Prompt, Response

T = TypeVar("T", Prompt, Group, Comparison)


class DataConfig(Config):
    """Which data, in which shape, and what to do with rows that do not fit."""

    path: str | list[str] = Field(
        description="a .jsonl or .parquet file, a folder saved by datasets, hub:org/name:split, or a list of these"
    )
    template: Mode = Field(
        "auto", description="chat: use the tokenizer's chat template; plain: text as it is; auto: chat if there is a template"
    )
    shape: Shape | None = Field(None, description="the shape of the rows (null: seen from their columns)")
    fields: dict[str, str] = Field(default_factory=dict, description="our name of a column -> the file's, for example {prompt: question}")
    where: dict[str, Any] = Field(default_factory=dict, description="use only rows that have these values, for example {source: arena}")
    limit: int | None = Field(None, gt=0, description="stop after this many usable rows")
    turns: Turns = Field("last", description="of {messages}: learn the last assistant turn, or all of them")
    max_prompt_tokens: int | None = Field(None, gt=0, description="the longest prompt, in tokens")
    max_response_tokens: int | None = Field(None, gt=0, description="the longest response, in tokens")
    on_long: Literal["error", "skip", "truncate"] = Field(
        "error",
        description="what is longer: stop, skip the row, or cut. A response loses its end and is marked truncated; "
        "a plain prompt loses its beginning; a chat prompt cannot be cut, so its row is skipped",
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="a row that cannot be used: stop, or skip and list it")
    step_separator: str = Field("\n", description="what is put between the steps of a {steps, labels} row")
    holdout: float = Field(0.0, ge=0, lt=1, description="share of prompts kept for evaluation, chosen by a hash of the prompt's text")

    @field_validator("path")
    @classmethod
    def _some_path(cls, path: str | list[str]) -> str | list[str]:
        if not path:
            raise ValueError("names no data")
        return path

    @field_validator("fields")
    @classmethod
    def _known_names(cls, fields: dict[str, str]) -> dict[str, str]:
        unknown = sorted(fields.keys() - shapes.NAMES)
        if unknown:
            raise ValueError(f"maps the unknown name {unknown[0]!r}: our names are {', '.join(sorted(shapes.NAMES))}")
        return fields


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """What was read.

    records: for training, in the order of the files.
    holdout: for evaluation; no prompt is in both.
    skipped: (place, reason) of every row that was left out because it was bad or too long.
    """

    records: list[T]
    holdout: list[T]
    skipped: list[tuple[str, str]]

    def report(self, tracker: Tracker) -> None:
        """Tell how much data there is, and which rows were left out."""
        rows = [f"{place}: {reason}" for place, reason in self.skipped]
        tracker.event("data", records=len(self.records), holdout=len(self.holdout), skipped=len(rows), skipped_rows=rows)


def load_prompts(config: DataConfig, template: Template) -> Loaded[Prompt]:
    """Read prompts: {prompt}, or {messages} that end with the user. Other columns travel in `Prompt.row`.

    Raises DataError naming file, row, column and fix; ConfigError for settings that do not fit prompts.
    """
    return _load(config, "prompts", lambda columns: shapes.prompt(columns, template, config.shape), template)


def load_demonstrations(config: DataConfig, template: Template) -> Loaded[Group]:
    """Read groups of one response: {prompt, completion}, {messages} or {text} (see `shapes.demonstration`).

    Raises DataError naming file, row, column and fix; ConfigError for settings that do not fit demonstrations.
    """
    return _load(config, "demonstrations", lambda columns: shapes.demonstration(columns, template, config.shape, config.turns), template)


def load_comparisons(config: DataConfig, template: Template) -> Loaded[Comparison]:
    """Read pairs, rankings, ratings and binary labels (see `shapes.comparison`).

    Raises DataError naming file, row, column and fix; ConfigError for settings that do not fit comparisons.
    """
    return _load(config, "comparisons", lambda columns: shapes.comparison(columns, template, config.shape, config.step_separator), template)


def load_samples(config: DataConfig, template: Template) -> Loaded[Group]:
    """Read responses that nobody judged (see `shapes.sample`), such as `trimtab sample` writes.

    Raises DataError naming file, row, column and fix; ConfigError for settings that do not fit samples.
    """
    return _load(config, "samples", lambda columns: shapes.sample(columns, template, config.shape), template)


def to_row(comparison: Comparison) -> dict[str, Any]:
    """A comparison as a row that `load_comparisons` reads back equal.

    Sampler log-probabilities and policy versions are not kept, and text is encoded anew. Raises DataError for responses
    of several turns, whose turns are no longer known.
    """
    group, kind = comparison.group, comparison.kind
    if any(response.mask is not None for response in group.responses):
        raise DataError("a response of several turns cannot be written as one text", fix="keep the rows it was read from")
    text, row = group.prompt.text, dict(group.prompt.row)
    row["prompt"] = text if isinstance(text, str) else [dict(turn) for turn in text]
    answers, cut = [r.text for r in group.responses], [r.truncated for r in group.responses]
    if kind == "pair":
        order = sorted(range(2), key=lambda i: -comparison.scores[i])
        for name, i in zip(("chosen", "rejected"), order, strict=True):
            row[name] = answers[i]
            if cut[i]:
                row[f"{name}_truncated"] = True
        unsure = {} if comparison.probability == 1 else {"probability": comparison.probability}
        return row | ({"margin": comparison.margin} if comparison.margin else {}) | unsure
    if kind == "process":
        row |= {"steps": [step.text for step in comparison.steps], "labels": [step.label for step in comparison.steps]}
        return row | ({"truncated": True} if cut[0] else {})
    scores = list(comparison.scores)
    if kind == "binary" and len(answers) == 1:
        row |= {"completion": answers[0], "label": bool(scores[0])}
    elif kind == "binary":
        row |= {"responses": answers, "labels": [bool(score) for score in scores]}
    elif kind == "rating":
        row |= {"responses": answers, "scores": scores}
    else:
        row |= {"responses": answers, "ranks": [1 + sum(other > score for other in scores) for score in scores]}
    return row | ({"truncated": cut} if any(cut) else {})


def group_row(group: Group) -> dict[str, Any]:
    """Sampled responses as a row: prompt, responses, and which were cut off. In order of preference, it is a ranking."""
    text = group.prompt.text
    prompt = text if isinstance(text, str) else [dict(turn) for turn in text]
    return {"prompt": prompt, "responses": [r.text for r in group.responses], "truncated": [r.truncated for r in group.responses]}


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSONL. The file appears complete or not at all.

    Raises DataError for a row that JSON cannot hold.
    """
    with snapshot.new_file(Path(path)) as file:
        for number, row in enumerate(rows, 1):
            try:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            except (TypeError, ValueError) as error:
                raise DataError(f"the row cannot be written as JSON: {error}", where=f"{path}:{number}") from None


class _TooLong(DataError):
    """A prompt or response exceeds its limit and may not or cannot be cut."""


def _load(config: DataConfig, kind: Kind, parse: Callable[[Columns], T], template: Template) -> Loaded[T]:
    if config.shape is not None and config.shape not in shapes.SHAPES[kind]:
        allowed = ", ".join(shapes.SHAPES[kind])
        raise ConfigError(f"{config.shape!r} is not a shape of {kind}", where="data.shape", fix=f"set one of {allowed}, or null")
    loaded: Loaded[T] = Loaded([], [], [])
    seen = 0
    for row in read_rows(config.path):
        seen += 1
        if not _wanted(row, config.where):
            continue
        try:
            record = parse(Columns(row.values, config.fields))
            held = _share(record) < config.holdout  # by the whole prompt, before it is cut
            record = _fit(record, config, template)
            if isinstance(record, Comparison) and record.kind in ("pair", "ranking"):
                shapes.check_different(record.group, record.scores)
        except DataError as error:
            policy = config.on_long if isinstance(error, _TooLong) else config.on_bad_row
            if policy == "error":
                raise _placed(error, row, policy_setting="on_long" if isinstance(error, _TooLong) else "on_bad_row") from None
            loaded.skipped.append((row.place, f"{error.where}: {error.what}" if error.where else error.what))
            continue
        (loaded.holdout if held else loaded.records).append(record)
        if len(loaded.records) + len(loaded.holdout) == config.limit:
            break
    _check_some(loaded, config, seen)
    return loaded


def _placed(error: DataError, row: Row, policy_setting: str) -> DataError:
    where = f"{row.place}, {error.where}" if error.where else row.place
    return DataError(error.what, where=where, fix=f"{error.fix or 'correct the row'}; or set data.{policy_setting}=skip")


def _wanted(row: Row, where: Mapping[str, Any]) -> bool:
    return all(column in row.values and row.values[column] == value for column, value in where.items())


def _check_some(loaded: Loaded[T], config: DataConfig, seen: int) -> None:
    if loaded.records:
        return
    source = config.path if isinstance(config.path, str) else ", ".join(config.path)
    if loaded.holdout:
        raise DataError("every row was held out", where=source, fix="lower data.holdout, or give rows with different prompts")
    if loaded.skipped:
        first = "; ".join(f"{place}: {reason}" for place, reason in loaded.skipped[:3])
        raise DataError(f"all {len(loaded.skipped)} rows were skipped: {first}", where=source, fix="correct the rows, or the data settings")
    raise DataError(f"none of {seen} rows has {dict(config.where)}", where=source, fix="check the columns and values of data.where")


def _share(record: Prompt | Group | Comparison) -> float:
    """A number in [0, 1) that depends on the prompt's text alone: not on tokenizer, template, order or seed."""
    if isinstance(record, Prompt):
        prompt, responses = record, tuple[Response, ...]()
    else:
        group = record.group if isinstance(record, Comparison) else record
        prompt, responses = group.prompt, group.responses
    text = prompt.as_text
    if not isinstance(prompt.text, str) and len(prompt.text) == 1 and prompt.text[0]["role"] == "user":
        text = prompt.text[0]["content"]  # the same prompt, written as a turn
    if not text:  # plain text is a response to nothing: there the response decides
        text = "".join(response.text for response in responses)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _fit(record: T, config: DataConfig, template: Template) -> T:
    """Apply the length limits. Raises _TooLong where something may not or cannot be cut."""
    if isinstance(record, Prompt):
        return _fit_prompt(record, config, template)
    if isinstance(record, Comparison):
        group = _fit(record.group, config, template)
        return replace(record, group=group, steps=tuple(step for step in record.steps if step.end < len(group.responses[0].tokens)))
    prompt = _fit_prompt(record.prompt, config, template)
    return Group(prompt, tuple(_fit_response(response, config, template) for response in record.responses))


def _fit_prompt(prompt: Prompt, config: DataConfig, template: Template) -> Prompt:
    limit, count = config.max_prompt_tokens, len(prompt.tokens)
    if limit is None or count <= limit:
        return prompt
    start = template.start if prompt.tokens[: len(template.start)] == template.start else ()
    room = limit - len(start)
    if config.on_long != "truncate" or template.mode == "chat" or room < 1:
        raise _TooLong(f"the prompt has {count} tokens, more than max_prompt_tokens={limit}", fix="raise data.max_prompt_tokens")
    kept = prompt.tokens[-room:]
    return replace(prompt, tokens=start + kept, text=template.decode(kept))


def _fit_response(response: Response, config: DataConfig, template: Template) -> Response:
    limit, count = config.max_response_tokens, len(response.tokens)
    if limit is None or count <= limit:
        return response
    if config.on_long != "truncate":
        raise _TooLong(f"a response has {count} tokens, more than max_response_tokens={limit}", fix="raise data.max_response_tokens")
    kept = response.tokens[:limit]
    mask = None if response.mask is None else response.mask[:limit]
    return Response(kept, template.decode(kept), truncated=True, mask=mask)
