"""Random recipes, random data rows and whole runs end well or in one clear error, never in anything else."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

import resuming
import tiny
from trimtab.cli import main
from trimtab.cli.commands import COMMANDS, config_of
from trimtab.config import describe_settings, load_recipe, to_yaml
from trimtab.data import records
from trimtab.data.records import DataConfig
from trimtab.data.templates import Template
from trimtab.errors import TrimtabError

FEW, MANY, RUNS = 150, 5000, 400
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
    return [setting.name for setting in describe_settings(config_of(command))]


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
        recipe = load_recipe(config_of(command), None, found)
    except TrimtabError:
        return
    assert load_recipe(config_of(command), _file(to_yaml(recipe), "recipe.yaml"), []) == recipe or "nan" in to_yaml(recipe).lower()


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


# --- runs ----------------------------------------------------------------------------------------------------------------------------

SMALL = st.one_of(
    st.none(), st.booleans(), st.integers(-1, 3), st.sampled_from([0.0, 0.5, 1e-5, 1e-30, -0.5, float("nan"), float("inf")]),
    st.sampled_from(["", "auto", "none", "frozen", "reward.py:letters", "reward.py", "pairs.jsonl", "model", "é", "\x00", "float64"]),
    st.sampled_from([[], {}, [0], ["x"], {"x": 1}]),
)  # fmt: skip
ELSEWHERE = ("output", "trackers", "resume", "reward.url", "model.device")
"""Settings whose values would leave the run's folder, the network or the machine that is tried here."""


@st.composite
def runs(draw: Callable[..., Any]) -> tuple[str, list[str]]:
    """A kind of run with some settings changed, which may well be wrong."""
    kind = draw(st.sampled_from(sorted(resuming.KINDS)))
    known = [name for name in names(resuming.KINDS[kind][0]) if not name.startswith(ELSEWHERE)]
    return kind, [f"{draw(st.sampled_from(known))}={json.dumps(draw(SMALL))}" for _ in range(draw(st.integers(1, 2)))]


@cache
def workshop() -> Path:
    place = _folder() / "runs"
    place.mkdir()
    resuming.prepare(place)
    return place


def try_run(case: tuple[str, list[str]]) -> int:
    """Run it; returns its exit status. Where it ends in an error, what is left is a run that has begun, or nothing."""
    kind, found = case
    run = workshop() / "run"
    shutil.rmtree(run, ignore_errors=True)
    with chdir(workshop()), redirect_stderr(StringIO()) as said, redirect_stdout(StringIO()):
        status = main([*resuming.command(kind, "run"), *found])
    if status == 0:
        assert resuming.outcome(run)["metrics"]
    else:
        assert status == 2
        assert "error: " in said.getvalue()
        assert not run.exists() or (run / "metrics.jsonl").stat().st_size or list(run.glob("failures/*")), sorted(run.rglob("*"))
    assert not [path for path in run.rglob("*") if path.is_dir() and path.name.startswith(".")]
    return status


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


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(max_examples=RUNS, **QUIET)
@given(runs())
def test_four_hundred_runs(case: tuple[str, list[str]]) -> None:
    event(f"exit status {try_run(case)}")
