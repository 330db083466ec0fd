"""TensorBoard: `tensorboard --logdir RUN` (or the parent of several runs)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class TensorBoardTracker:
    """Writes event files to FOLDER/tensorboard, with TensorBoard's own writer: neither torch nor TensorFlow is needed."""

    def __init__(self, folder: Path, run_name: str, config: Mapping[str, Any]) -> None:
        self._writer = EventFileWriter(str(folder / "tensorboard"))
        self._text(0, "config", f"{run_name}\n\n{_code(json.dumps(config, indent=2, default=str))}")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step, Summary(value=values))

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        self._text(step, "samples", "\n\n".join(_code(json.dumps(row, ensure_ascii=False, indent=2, default=str)) for row in rows))

    def event(self, kind: str, **details: Any) -> None:
        self._text(0, f"event/{kind}", _code(json.dumps(details, ensure_ascii=False, default=str)))

    def rewind(self, step: int) -> None:
        """What was sent stays: the steps come a second time, after the event that says why."""

    def close(self) -> None:
        self._writer.close()

    def _text(self, step: int, tag: str, text: str) -> None:
        self._write(step, text_pb(tag, text))

    def _write(self, step: int, summary: Summary) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()


def _code(text: str) -> str:
    """Text as a Markdown code block, so that what a model wrote is shown and not interpreted."""
    return "\n".join(f"    {line}" for line in text.splitlines())
