"""Other trackers receive the same stream and keep it on this machine; those whose package is absent say how to get it."""

from __future__ import annotations

from pathlib import Path

import pytest

from trimtab.errors import ConfigError
from trimtab.runs.trackers import TRACKERS, make


@pytest.mark.parametrize("name", TRACKERS)
def test_tracker_writes_the_stream(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name, reason=f"{name} is an optional extra: pip install 'trimtab[track]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tracker,) = make([name], tmp_path, "run", {"optim": {"lr": 1e-3}})
    tracker.event("started", stage="ppo")
    for step in range(3):
        tracker.log(step, {"reward/mean": step * 0.5})
    tracker.samples(0, [{"prompt": "a", "response": "b", "reward": 1.0}])
    tracker.event("finished")
    tracker.close()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > 0


def test_tensorboard_reads_back_the_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is an optional extra")
    (tracker,) = make(["tensorboard"], tmp_path, "run", {})
    for step in range(3):
        tracker.log(step, {"reward/mean": step * 0.5})
    tracker.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/mean")] == [(0, 0.0), (1, 0.5), (2, 1.0)]


def test_mlflow_reads_back_the_numbers_and_how_the_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is an optional extra")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tracker,) = make(["mlflow"], tmp_path, "run", {"optim": {"lr": 1e-3}})
    tracker.log(2, {"reward/a part!": 0.5})
    tracker.event("failed", error="boom")
    tracker.close()
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("trimtab").experiment_id])
    assert (run.info.run_name, run.info.status, run.data.params) == ("run", "FAILED", {"optim.lr": "0.001"})
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "reward/a part_")] == [(2, 0.5)]


def test_unknown_tracker_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlflow'"):
        make(["mlfow"], tmp_path, "run", {})


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.delitem(__import__("sys").modules, "trimtab.runs.trackers.wandb", raising=False)
    with pytest.raises(ConfigError, match="trimtab\\[track\\]"):
        make(["wandb"], tmp_path, "run", {})
