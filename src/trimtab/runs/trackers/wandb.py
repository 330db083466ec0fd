"""Weights & Biases, offline unless the environment variable WANDB_MODE says otherwise.

`wandb sync FOLDER/wandb/offline-run-*` sends an offline run later.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # read when wandb is imported: without it, its crashes are sent to Sentry

import wandb


class WandbTracker:
    """Writes a run of project `trimtab` to FOLDER/wandb."""

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        self._run = wandb.init(
            project="trimtab",
            name=run_name,
            dir=str(folder),
            config=dict(config),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(silent=True),
        )
        # Not wandb's own step, which may never go back: samples and events come between the numbers of two steps.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        listed = [{"step": step, **row} for row in rows]
        if listed:
            columns = list(dict.fromkeys(name for row in listed for name in row))
            cells = [[_cell(row.get(name)) for name in columns] for row in listed]
            self._run.log({"step": step, "samples": wandb.Table(columns=columns, data=cells)})

    def event(self, kind: str, **details: Any) -> None:
        self._run.summary[f"event/{kind}"] = {name: str(value) for name, value in details.items()}

    def rewind(self, step: int) -> None:
        """What was sent stays: the steps come a second time, after the event that says why."""

    def close(self) -> None:
        self._run.finish()


def _cell(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
