"""Ctrl-C and SIGTERM: the first lets the step end and saves it, the second saves the state of its start, the third leaves at once.

A step may be abandoned as long as it has changed no weight: until then all that it has changed is small, and was noted at its start
(`training.checkpoint`). It is abandoned between two pieces of work, where it asks (`pause`), or wherever it waits for other people's code
(`at_once`). Once a weight has changed (`commit`) it is finished.
"""

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


class Abandoned(Interrupted):
    """The run was asked to end within a step, which has changed no weight and is not finished."""


@dataclass
class Stop:
    """Which signal has asked the run to end, if one has, and whether another one has; and what may be done about it now.

    waiting:   within how many calls the step may be left wherever it is.
    stepping:  a step is under way that may be abandoned.
    changed:   it has changed a weight.
    abandoned: it was abandoned.
    """

    signal: int | None = None
    again: bool = False
    waiting: int = 0
    stepping: bool = False
    changed: bool = False
    abandoned: bool = False

    def check(self) -> None:
        """Raises Interrupted if the run was asked to end."""
        if self.signal is not None:
            raise Interrupted(self.signal)

    @contextmanager
    def step(self, *, abandonable: bool) -> Iterator[None]:
        """A step; if the state of its start is known, it can be abandoned."""
        self.stepping, self.changed, self.waiting = abandonable, False, 0
        try:
            yield
        finally:
            self.stepping = False

    def abandon(self) -> None:
        """Raises Abandoned if that is wanted and possible."""
        if self.signal is not None and self.again and self.stepping and not self.changed:
            self.abandoned = True
            raise Abandoned(self.signal)

    def note(self, number: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.again:
            raise Interrupted(number)
        if self.signal is None:
            self.signal = number
            _say("finishing this step, then saving; once more to abandon it, and save the state of its start")
            return
        self.again = True
        if self.stepping and not self.changed:
            _say(f"abandoning this step, then saving the state of its start; {LAST}")
        elif self.stepping:
            _say(f"this step has changed weights already: finishing it, then saving; {LAST}")
        else:
            _say(f"saving; {LAST}")
        if self.waiting:
            self.abandon()


LAST = "once more to leave at once (what follows the last checkpoint is lost)"
_stop: Stop | None = None
"""What is deferred in this process at the moment: signals come to its main thread only."""


@contextmanager
def deferred() -> Iterator[Stop]:
    """While this lasts, the first two signals are only noted; a third one interrupts at once. Outside the main thread nothing changes."""
    global _stop
    if not _in_main():
        yield Stop()
        return
    outer, stop = _stop, Stop()
    before: dict[int, Any] = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    _stop = stop
    try:
        yield stop
    finally:
        _stop = outer
        for number, handler in before.items():
            signal.signal(number, handler)


def pause() -> None:
    """A place between two pieces of work, where a step may be abandoned: raises Abandoned if that is wanted and possible.

    What works beside the main thread is ended here once the step is abandoned.
    """
    if _stop is None:
        return
    if _in_main():
        _stop.abandon()
    elif _stop.abandoned:
        raise Abandoned(_stop.signal or signal.SIGINT)


@contextmanager
def at_once() -> Iterator[None]:
    """Within this the main thread may be left anywhere: it waits for code that changes nothing of the run's."""
    if _stop is None or not _in_main():
        yield
        return
    stop = _stop
    stop.abandon()
    stop.waiting += 1
    try:
        yield
    finally:
        stop.waiting -= 1


def commit() -> None:
    """Weights are about to change: from here on the step is finished, whatever comes."""
    if _stop is not None and _in_main():
        _stop.changed = True


def _in_main() -> bool:
    return threading.current_thread() is threading.main_thread()


def _say(what: str) -> None:
    print(f"\n{what}", file=sys.stderr)
