"""A run is its files: nothing is lost, nothing is half-made, and every line can be read back."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trimtab.errors import ConfigError, DataError, RunError
from trimtab.runs.directory import RunDirectory


def test_what_is_written_is_read_back_exactly(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "seed: 3\n") as run:
        run.log(0, {"loss": 0.1 + 0.2, "bad": float("nan")})
        run.samples(0, [{"prompt": "ä", "response": "<b>"}])
        run.event("saved", checkpoint="step-1")
    again = RunDirectory.open(tmp_path / "run")
    assert again.metrics() == [{"step": 0, "loss": 0.1 + 0.2, "bad": None}]
    assert again.sample_rows() == [{"step": 0, "prompt": "ä", "response": "<b>"}]
    assert [event["event"] for event in again.events()] == ["saved", "finished"]
    assert again.config() == {"seed": 3}


@pytest.mark.parametrize(("error", "word"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("boom"), "failed")])
def test_an_interrupted_run_keeps_what_it_wrote_and_says_so(tmp_path: Path, error: BaseException, word: str) -> None:
    def train() -> None:
        with RunDirectory.create(tmp_path / "run", "{}") as run:
            run.log(0, {"loss": 1.0})
            raise error

    with pytest.raises(type(error)):
        train()
    again = RunDirectory.open(tmp_path / "run")
    assert again.metrics() == [{"step": 0, "loss": 1.0}]
    assert again.events()[-1]["event"] == word


def test_the_torn_last_line_of_a_killed_run_is_left_out_and_damage_elsewhere_is_named(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "{}") as run:
        run.log(0, {"loss": 1.0})
        run.log(1, {"loss": 2.0})
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text(path.read_text()[:-4])
    assert len(RunDirectory.open(tmp_path / "run").metrics()) == 1
    path.write_text('{"step":\n{"step": 1}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:1"):
        RunDirectory.open(tmp_path / "run").metrics()


def test_a_mistake_before_the_first_step_leaves_nothing_and_brings_back_the_old_run(tmp_path: Path) -> None:
    with pytest.raises(DataError), RunDirectory.create(tmp_path / "run", "{}"):
        raise DataError("bad row")
    assert list(tmp_path.iterdir()) == []
    with RunDirectory.create(tmp_path / "run", "old: 1") as run:
        run.log(0, {})
    with pytest.raises(ConfigError), RunDirectory.create(tmp_path / "run", "new: 1", overwrite=True):
        raise ConfigError("bad setting")
    assert RunDirectory.open(tmp_path / "run").config() == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["a\u2028b\x85c\nd", "\ud800", "tab\t\x00", "日本"])
def test_any_text_is_one_line_and_reads_back_unchanged(tmp_path: Path, text: str) -> None:
    with RunDirectory.create(tmp_path / "run", "{}") as run:
        run.samples(0, [{"response": text}, {"response": "next"}])
    assert [row["response"] for row in RunDirectory.open(tmp_path / "run").sample_rows()] == [text, "next"]


def test_every_line_is_json_whatever_numbers_and_objects_it_was_given(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "{}") as run:
        run.log(0, {"numpy": np.float32(0.5), "bad": float("-inf")})
        run.samples(0, [{"parts": {"a": float("nan")}, "tokens": np.int64(3), "row": (1, Path("x"))}])
    again = RunDirectory.open(tmp_path / "run")
    assert again.metrics() == [{"step": 0, "numpy": 0.5, "bad": None}]
    assert again.sample_rows() == [{"step": 0, "parts": {"a": None}, "tokens": 3.0, "row": [1, "x"]}]


def test_a_line_torn_inside_a_letter_is_left_out(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "{}") as run:
        run.samples(0, [{"response": "fine"}])
    with (tmp_path / "run" / "samples.jsonl").open("ab") as file:
        file.write('{"response": "ä'.encode()[:-1])
    assert len(RunDirectory.open(tmp_path / "run").sample_rows()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom"), DataError("bad row")])
def test_whatever_ends_a_run_before_its_first_step_brings_back_the_run_it_was_to_replace(tmp_path: Path, error: BaseException) -> None:
    with RunDirectory.create(tmp_path / "run", "old: 1") as run:
        run.log(0, {"loss": 1.0})
    with pytest.raises(type(error)), RunDirectory.create(tmp_path / "run", "new: 1", overwrite=True):
        raise error
    assert RunDirectory.open(tmp_path / "run").metrics() == [{"step": 0, "loss": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_earlier_run_is_replaced_at_the_first_step_and_only_when_asked(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path / "run", "old: 1"):
        pass
    with pytest.raises(RunError, match="already holds a run"):
        RunDirectory.create(tmp_path / "run", "new: 1")
    with RunDirectory.create(tmp_path / "run", "new: 1", overwrite=True) as run:
        run.log(0, {})
    assert run.config() == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


BEGUN = """
import sys, time
from pathlib import Path
from trimtab.runs.directory import RunDirectory

with RunDirectory.create("run", "new: 1", overwrite=True) as run:
    for step in range(int(sys.argv[1])):
        run.log(step, {})
    if sys.argv[2] == "samples":
        run.samples(0, [{"response": "late"}])
    if sys.argv[2] == "no recipe":
        (run.path / "config.yaml").unlink()
    print("begun", flush=True)
    time.sleep(60)
"""


def killed_while_it_replaces(place: Path, steps: int = 0, more: str = "") -> None:
    """An earlier run, and a process that is killed while it replaces it."""
    with RunDirectory.create(place / "run", "old: 1") as run:
        run.log(0, {"loss": 1.0})
    process = subprocess.Popen([sys.executable, "-c", BEGUN, str(steps), more], cwd=place, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    if not steps:
        with pytest.raises(RunError, match="another process"):
            RunDirectory.create(place / "run", "third: 1", overwrite=True)
    process.kill()
    process.communicate()


@pytest.mark.parametrize("state", ["", "no recipe", "no folder"])
def test_a_run_set_aside_by_a_process_that_was_killed_is_brought_back(
    state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_while_it_replaces(tmp_path, more=state)
    if state == "no folder":
        shutil.rmtree(tmp_path / "run")
    with pytest.raises(RunError, match="already holds a run"):
        RunDirectory.create(tmp_path / "run", "third: 1")
    assert "the earlier one is back" in capsys.readouterr().err
    assert RunDirectory.open(tmp_path / "run").config() == {"old": 1}
    assert RunDirectory.open(tmp_path / "run").metrics() == [{"step": 0, "loss": 1.0}]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_overwriting_once_more_replaces_the_run_that_was_set_aside(tmp_path: Path) -> None:
    killed_while_it_replaces(tmp_path)
    with pytest.raises(KeyboardInterrupt), RunDirectory.create(tmp_path / "run", "third: 1", overwrite=True):
        raise KeyboardInterrupt
    assert RunDirectory.open(tmp_path / "run").config() == {"old": 1}
    with RunDirectory.create(tmp_path / "run", "third: 1", overwrite=True) as run:
        run.log(0, {})
    assert RunDirectory.open(tmp_path / "run").config() == {"third": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_going_on_with_the_new_run_keeps_the_old_one_until_there_is_a_step(tmp_path: Path) -> None:
    killed_while_it_replaces(tmp_path)
    run, step = RunDirectory.resume(tmp_path / "run")
    with pytest.raises(RunError, match="another process"):
        RunDirectory.create(tmp_path / "run", "third: 1", overwrite=True)
    assert (run.config(), step) == ({"new": 1}, 0)
    with pytest.raises(DataError), run:
        raise DataError("bad row")
    assert RunDirectory.open(tmp_path / "run").config() == {"old": 1}
    killed_while_it_replaces(tmp_path / "again")
    run, _ = RunDirectory.resume(tmp_path / "again/run")
    with run:
        run.log(0, {})
    assert RunDirectory.open(tmp_path / "again/run").config() == {"new": 1}
    assert [path.name for path in (tmp_path / "again").iterdir()] == ["run"]


def test_going_on_where_there_is_no_new_run_is_going_on_with_the_old_one(tmp_path: Path) -> None:
    killed_while_it_replaces(tmp_path)
    shutil.rmtree(tmp_path / "run")
    RunDirectory.recover(tmp_path / "run")
    run, _ = RunDirectory.resume(tmp_path / "run")
    run.close()
    assert run.config() == {"old": 1}


def test_where_both_runs_hold_work_both_are_kept_and_it_is_said_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    killed_while_it_replaces(tmp_path, more="samples")
    for start in (lambda: RunDirectory.create(tmp_path / "run", "third: 1"), lambda: RunDirectory.resume(tmp_path / "run")[0].close()):
        with suppress(RunError):
            start()
        said = capsys.readouterr().err
        (left,) = tmp_path.glob(".run-replaced-*")
        assert str(left) in said
        assert RunDirectory.open(left).config() == {"old": 1}
        assert RunDirectory.open(tmp_path / "run").config() == {"new": 1}


def test_a_process_killed_after_its_first_step_has_replaced_the_run(tmp_path: Path) -> None:
    killed_while_it_replaces(tmp_path, steps=1)
    assert RunDirectory.open(tmp_path / "run").config() == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_an_end_leaves_in_the_middle_of_a_removal_is_removed_and_never_brought_back(tmp_path: Path) -> None:
    (tmp_path / ".run-dropped-1").mkdir()
    (tmp_path / ".run-dropped-1/config.yaml").write_text("half: 1")
    with RunDirectory.create(tmp_path / "run", "new: 1") as run:
        run.log(0, {})
    assert run.config() == {"new": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Broken:
    """A tracker whose network is down."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        raise ConnectionError("no network")

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        raise AssertionError("a tracker that failed is not asked again")

    def event(self, kind: str, **details: Any) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory.create(tmp_path / "run", "{}", [Broken()]) as run:
        run.log(0, {"loss": 1.0})
        run.samples(0, [{}])
        run.log(1, {"loss": 0.5})
    assert len(run.metrics()) == 2
    assert run.events()[0]["event"] == "tracker failed"
    assert "no network" in capsys.readouterr().err


def test_only_times_differ_between_two_equal_runs(tmp_path: Path) -> None:
    for name in "ab":
        with RunDirectory.create(tmp_path / name, "seed: 0") as run:
            run.log(0, {"loss": 0.1})
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_folders_that_are_not_ours_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="something other than a run"):
            RunDirectory.create(tmp_path, "{}", overwrite=overwrite)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write here"):
        RunDirectory.create(tmp_path / "file" / "run", "{}")
    with pytest.raises(RunError, match="no run directory"):
        RunDirectory.open(tmp_path)
    assert json.dumps((tmp_path / "precious.txt").read_text()) == '"x"'
