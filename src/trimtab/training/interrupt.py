"""Ctrl-C and SIGTERM: the step is finished and saved before the run ends."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """The run was asked to end, and has."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number


@dataclass
class Stop:
    """Which signal has asked the run to end, if one has."""

    signal: int | None = None

    def check(self) -> None:
        """Raises Interrupted if the run was asked to end."""
        if self.signal is not None:
            raise Interrupted(self.signal)


@contextmanager
def deferred() -> Iterator[Stop]:
    """While this lasts, the first signal is only noted; a second one interrupts at once. Outside the main thread nothing changes."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, frame: FrameType | None) -> None:
        if stop.signal is not None:
            raise Interrupted(number)
        stop.signal = number
        print("\nfinishing this step, then saving; once more to leave at once (what follows the last checkpoint is lost)", file=sys.stderr)

    before: dict[int, Any] = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
