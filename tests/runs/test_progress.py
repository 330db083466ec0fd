"""Progress says what is needed to decide whether to wait, on a terminal and in a log file."""

from __future__ import annotations

import sys

import pytest

from trimtab.runs import progress
from trimtab.runs.progress import Progress


def follow(steps: int, shown: Progress) -> None:
    shown.event("training", steps=steps)
    for step in range(steps):
        shown.log(step, {"reward/mean": step / 10, "kl/mean": 1.0, "policy/loss": 0.0})
    shown.close()


def test_without_a_terminal_there_are_a_few_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    follow(100, Progress("ppo"))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.split(",")[0] for line in err.splitlines()] == ["ppo: step 1/100", "ppo: step 100/100"]
    assert err.splitlines()[-1].endswith("0 s left  reward 9.900  kl 1.000")
    assert err.replace("\n", "").isprintable()


def test_lines_come_every_so_often(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    follow(10, Progress("sft"))
    assert [line.split("/")[0] for line in capsys.readouterr().err.splitlines()] == [f"sft: step {n}" for n in (1, 3, 5, 7, 9, 10)]


def test_on_a_terminal_there_is_a_bar_and_the_cursor_is_given_back(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    shown = Progress("[ppo]")
    follow(3, shown)
    shown.close()
    err = capsys.readouterr().err
    assert "[ppo]" in err
    assert "3/3" in err
    assert "reward 0.200" in err
    assert err.count("\x1b[?25l") == err.count("\x1b[?25h")


def test_skipped_rows_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    Progress("sft").event("data", records=3, skipped=2, skipped_rows=["a", "b"])
    assert "2 rows were skipped" in capsys.readouterr().err
