"""MLflow, in a SQLite file beside the run unless the environment variable MLFLOW_TRACKING_URI names another store.

`mlflow ui --backend-store-uri sqlite:///FOLDER/mlflow/mlflow.db` shows it.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from trimtab.runs.trackers import flatten

EXPERIMENT = "trimtab"
LONGEST_PARAM, PARAMS_AT_ONCE, METRICS_AT_ONCE = 6000, 100, 1000  # limits of MLflow's stores


class MlflowTracker:
    """Writes a run of experiment `trimtab`: settings as params, metrics by step, samples as JSON artifacts, events as tags."""

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        local = (folder / "mlflow").resolve()
        uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
        if uri is None:
            local.mkdir(parents=True, exist_ok=True)
            uri, artifacts = f"sqlite:///{local / 'mlflow.db'}", (local / "artifacts").as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        known = self._client.get_experiment_by_name(EXPERIMENT)
        experiment = known.experiment_id if known else self._client.create_experiment(EXPERIMENT, artifact_location=artifacts)
        self._id = self._client.create_run(experiment, run_name=run_name).info.run_id
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in flatten(config).items()]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._id, params=params[first : first + PARAMS_AT_ONCE])
        self._status = "KILLED"  # until an event says how the run ended

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        entries = [Metric(_name(name), value, now, step) for name, value in metrics.items()]
        for first in range(0, len(entries), METRICS_AT_ONCE):
            self._client.log_batch(self._id, metrics=entries[first : first + METRICS_AT_ONCE])

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        self._client.log_dict(self._id, {"samples": [dict(row) for row in rows]}, f"samples/step-{step:06d}.json")

    def event(self, kind: str, **details: Any) -> None:
        self._status = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}.get(kind, self._status)
        self._client.set_tag(self._id, _name(f"event/{kind}"), str(details)[:LONGEST_PARAM])

    def rewind(self, step: int) -> None:
        """What was sent stays: the steps come a second time, after the event that says why."""

    def close(self) -> None:
        self._client.set_terminated(self._id, self._status)


def _name(name: str) -> str:
    """A name with the characters MLflow allows."""
    return re.sub(r"[^\w\-. /:]", "_", name)
