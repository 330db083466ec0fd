"""Random recipes and random data rows end well or in one clear error, never in anything else."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from trimtab.cli import COMMANDS, _config_of
from trimtab.config import describe_settings, load_recipe, to_yaml
from trimtab.data import records
from trimtab.data.records import DataConfig
from trimtab.data.templates import Template
from trimtab.errors import TrimtabError

FEW, MANY = 150, 5000
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}

# --- recipes -------------------------------------------------------------------------------------------------------------------------

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "frozen", "none", "default", "1e-5"]),
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3))


@cache
def names(command: str) -> list[str]:
    return [setting.name for setting in describe_settings(_config_of(command))]


@st.composite
def words(draw: Callable[..., Any]) -> tuple[str, list[str]]:
    """A command and some settings: mostly names that exist, sometimes misspelt, with values of any kind."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    found = []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.one_of(st.sampled_from(names(command)), st.sampled_from(names(command)), st.text(max_size=10)))
        value = draw(VALUES)
        found.append(f"{name}={draw(st.sampled_from([json.dumps(value), str(value)]))}")
    return command, found


def try_recipe(case: tuple[str, list[str]]) -> None:
    command, found = case
    try:
        recipe = load_recipe(_config_of(command), None, found)
    except TrimtabError:
        return
    assert load_recipe(_config_of(command), _file(to_yaml(recipe), "recipe.yaml"), []) == recipe or "nan" in to_yaml(recipe).lower()


# --- data ----------------------------------------------------------------------------------------------------------------------------

TEXT = st.one_of(st.text(max_size=12), st.sampled_from(["", " ", "good", "<|end|>", "\ud800", "\x00", "a" * 300]))
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": TEXT})
CELL = st.one_of(SCALARS, TEXT, st.lists(TEXT, max_size=3), st.lists(MESSAGE, max_size=4), st.lists(SCALARS, max_size=3), VALUES)
COLUMNS = (
    "prompt", "completion", "messages", "text", "chosen", "rejected", "responses", "completions", "scores", "ratings", "ranking", "label",
    "labels", "steps", "margin", "probability", "row",
)  # fmt: skip
ROW = st.dictionaries(st.sampled_from(COLUMNS), CELL, max_size=6)
LINE = st.one_of(ROW.map(json.dumps), ROW.map(json.dumps), VALUES.map(json.dumps), st.text(max_size=20))
LOADERS = (records.load_prompts, records.load_demonstrations, records.load_comparisons, records.load_samples)


@cache
def template(chat: bool) -> Template:
    return Template.of(tiny.tokenizer(chat))


@cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="trimtab-fuzz-"))


def _file(content: str, name: str) -> Path:
    path = _folder() / name
    path.write_text(content, encoding="utf-8", errors="surrogatepass")
    return path


def try_rows(lines: list[str], loader: Any, chat: bool, on_bad: str) -> None:
    path = _file("\n".join(lines), "rows.jsonl")
    with suppress(TrimtabError):
        loader(DataConfig(path=str(path), on_bad_row=on_bad), template(chat))


ARGUMENTS = {
    "lines": st.lists(LINE, max_size=4),
    "loader": st.sampled_from(LOADERS),
    "chat": st.booleans(),
    "on_bad": st.sampled_from(["error", "skip"]),
}


@settings(max_examples=FEW, **QUIET)
@given(words())
def test_a_recipe_is_valid_or_clearly_wrong(case: tuple[str, list[str]]) -> None:
    try_recipe(case)


@settings(max_examples=FEW, **QUIET)
@given(**ARGUMENTS)
def test_rows_are_read_or_clearly_wrong(lines: list[str], loader: Any, chat: bool, on_bad: str) -> None:
    try_rows(lines, loader, chat, on_bad)


@pytest.mark.slow
@settings(max_examples=MANY, **QUIET)
@given(words())
def test_five_thousand_recipes(case: tuple[str, list[str]]) -> None:
    try_recipe(case)


@pytest.mark.slow
@settings(max_examples=MANY, **QUIET)
@given(**ARGUMENTS)
def test_five_thousand_files_of_rows(lines: list[str], loader: Any, chat: bool, on_bad: str) -> None:
    try_rows(lines, loader, chat, on_bad)
