"""How a real trainer of the peer takes turns: a callback that waits for the parent at the beginning and after every step.

A step is timed from the parent's word to the log entry at its end: fetching the batch, all forward and backward passes, the optimiser.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from bench.link import Channel, Meter


class Over(Exception):
    """The parent wants no more steps."""


class Turns(TrainerCallback):  # type: ignore[misc]
    """Answers "step" with what the step took and what the trainer logged (`logging_steps` must be 1)."""

    def __init__(self, channel: Channel) -> None:
        self.channel, self.meter = channel, Meter()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._wait()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs is None or "train_runtime" in logs:
            return
        measured = self.meter.stop()
        self.channel.reply(**measured, metrics={name: float(value) for name, value in logs.items()})
        self._wait()

    def _wait(self) -> None:
        request = self.channel.receive()
        if request is None or request["command"] != "step":
            raise Over
        self.meter.start()
