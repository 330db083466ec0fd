"""A run is its files: nothing is lost, nothing is half-made, and every line can be read back."""

from __future__ import annotations

import json
from pathlib import Path

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
