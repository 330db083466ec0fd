"""Progress on the terminal, as a tracker: a bar with the time left, or plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trimtab.algorithms import PREFERENCES

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

HEADLINES = (
    "reward/mean", "kl/mean", "loss/nll", "loss/pair",
    *(f"loss/{name}" for name in PREFERENCES), "train/accuracy", "eval/accuracy", "eval/nll",
)  # fmt: skip
"""The numbers worth a glance while a run goes on, in this order; those a run has are shown."""

SECONDS_BETWEEN_LINES = 15


class Progress:
    """Shows step, time left and the headline numbers on standard error.

    The `training` event says how many `steps` there are. Without a terminal, a line is written at the first step, at the
    last, and every quarter of a minute between them, with no control characters.
    """

    def __init__(self, title: str, keys: Sequence[str] = HEADLINES) -> None:
        self.title, self.keys, self.total = title, keys, 0
        self._bar: tuple[Bar, TaskID] | None = None
        self._start, self._done = time.monotonic(), 0
        self._last_line: float | None = None

    def event(self, kind: str, **details: Any) -> None:
        if kind == "training":
            self.total, self._start, self._done = int(details["steps"]), time.monotonic(), int(details.get("done", 0))
            if sys.stderr.isatty():
                self._bar = _open(self.title, self.total)
        if kind == "environment changed":
            what = ", ".join(f"{name} {change['was']} -> {change['is']}" for name, change in details.items())
            print(f"{self.title}: the continuation will round differently from the run so far: {what}", file=sys.stderr)
        if kind == "step skipped":
            print(f"{self.title}: step {details['step']} was left out: {details['error']}", file=sys.stderr)
        if kind == "rolled back":
            print(
                f"{self.title}: the {details['number']} spiked at step {details['step']} ({details['value']:.4g}, median "
                f"{details['median']:.4g}); back at step {details['to']}, learning rates x {details['lr_factor']:g}",
                file=sys.stderr,
            )
        if details.get("skipped"):
            print(f"{self.title}: {details['skipped']} rows were skipped; events.jsonl lists them", file=sys.stderr)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = "  ".join(f"{_short(name)} {metrics[name]:.3f}" for name in self.keys if name in metrics)
        now, done = time.monotonic(), step + 1
        if self._bar is not None:
            bar, task = self._bar
            bar.update(task, completed=done, shown=shown)
        elif self._last_line is None or now - self._last_line > SECONDS_BETWEEN_LINES or done == self.total:
            self._last_line = now
            left = (now - self._start) / max(1, done - self._done) * max(self.total - done, 0)
            count = f"{done}/{self.total}, {left:.0f} s left" if self.total else str(done)
            print(f"{self.title}: step {count}  {shown}".rstrip(), file=sys.stderr, flush=True)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        pass

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        if self._bar is not None:
            self._bar[0].stop()
            self._bar = None


def _short(name: str) -> str:
    """`reward/mean` is "reward", other names keep their last word: `loss/nll` is "nll", `eval/accuracy` "eval accuracy"."""
    prefix, _, last = name.rpartition("/")
    return prefix if last == "mean" else last if prefix == "loss" else f"{prefix} {last}".strip()


def _open(title: str, total: int) -> tuple[Bar, TaskID]:
    from rich import progress
    from rich.console import Console
    from rich.markup import escape

    bar = progress.Progress(
        progress.TextColumn(f"[bold]{escape(title)}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("[dim]{task.fields[shown]}"),
        console=Console(stderr=True),
    )
    task = bar.add_task("", total=total, shown="")
    bar.start()
    return bar, task
