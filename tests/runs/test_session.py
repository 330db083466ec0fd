"""A session leaves a report however it ends, and nothing where it never began."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import ConfigError
from trimtab.runs.directory import RunDirectory
from trimtab.runs.session import session


def test_a_finished_run_has_its_report_and_says_what_it_was(tmp_path: Path) -> None:
    with session("ppo", str(tmp_path / "run"), "seed: 0") as run:
        run.log(0, {"reward/mean": 1.0})
    events = RunDirectory.open(tmp_path / "run").events()
    assert [event["event"] for event in events] == ["started", "finished"]
    assert events[0]["stage"] == "ppo"
    assert "reward/mean" in (tmp_path / "run" / "report.html").read_text()


def test_an_interrupted_run_has_its_report_too(tmp_path: Path) -> None:
    def train() -> None:
        with session("ppo", str(tmp_path / "run"), "seed: 0") as run:
            run.log(0, {"reward/mean": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert "was interrupted" in (tmp_path / "run" / "report.html").read_text()


def test_an_unknown_tracker_leaves_the_earlier_run_as_it_was(tmp_path: Path) -> None:
    with session("ppo", str(tmp_path / "run"), "seed: 0") as run:
        run.log(0, {"reward/mean": 1.0})
    with pytest.raises(ConfigError, match="no tracker"), session("ppo", str(tmp_path / "run"), "seed: 1", trackers=["x"], overwrite=True):
        raise AssertionError("a stage must not begin")
    assert RunDirectory.open(tmp_path / "run").config() == {"seed": 0}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
