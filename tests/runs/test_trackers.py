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


def test_unknown_tracker_gets_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlflow'"):
        make(["mlfow"], tmp_path, "run", {})


def test_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.delitem(__import__("sys").modules, "trimtab.runs.trackers.wandb", raising=False)
    with pytest.raises(ConfigError, match="trimtab\\[track\\]"):
        make(["wandb"], tmp_path, "run", {})
