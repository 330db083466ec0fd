"""Run a small predicate in a process of its own, with limits. They keep accidents from the run; they are no jail against attacks.

One bare worker process (no environment, no open files, no modules of this one) compiles the predicate once and serves all
calls, each in a fork of its own. A worker that dies or does not answer is ended and replaced.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trimtab.errors import RewardError

Failure = Literal["timeout", "cpu", "memory", "raised", "no number", "died"]

START_SECONDS = 60.0
"""How long a worker may take to start and to run the predicate's module."""
GRACE_SECONDS = 5.0
"""How much later than a call's own limit the worker may answer before it is taken for dead."""

ENVIRONMENT = {"PATH": os.defpath, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""Everything a predicate finds in its environment, but for its folder. Threads' buffers count as address space."""


@dataclass(frozen=True)
class Predicate:
    """Source text and the function in it.  file: its name in messages.  folder: where it may import from, or ""."""

    source: str
    name: str
    file: str
    folder: str = ""


@dataclass(frozen=True)
class Limits:
    """Of one call: wall-clock and CPU seconds, and address space in MiB."""

    seconds: float = 5.0
    cpu_seconds: int = 2
    memory_mb: int = 512


@dataclass(frozen=True)
class Verdict:
    """What came of one call: a value (a bool or a finite float), or a failure and its details."""

    value: bool | float | None
    failure: Failure | None = None
    detail: str = ""


class Sandbox:
    """Calls one predicate. Close it (it is a context manager), or let it be collected: the worker ends with it either way."""

    def __init__(self, predicate: Predicate, limits: Limits) -> None:
        self.predicate, self.limits = predicate, limits
        self.starts = 0
        self._worker: _Worker | None = None
        self._finalizer: weakref.finalize[Any, Sandbox] | None = None

    def call(self, *arguments: Any) -> Verdict:
        """One call. Arguments go over as JSON (what JSON cannot hold, as its text)."""
        if self._worker is None:
            self._start()
        assert self._worker is not None
        line = json.dumps(arguments, default=str).encode() + b"\n"
        try:
            answer = self._worker.ask(line, self.limits.seconds + GRACE_SECONDS)
        except BaseException:  # interrupted: an answer still under way must not become the next call's
            self.close()
            raise
        if answer is None:
            self.close()
            return Verdict(None, "died", "it took its worker process with it")
        return _verdict(answer)

    def _start(self) -> None:
        """Start a worker. Raises RewardError if the predicate's source does not run."""
        worker = _Worker()
        self.starts += 1
        self._finalizer = weakref.finalize(self, worker.end)
        request = asdict(self.predicate) | asdict(self.limits)
        answer = worker.ask(json.dumps(request).encode() + b"\n", START_SECONDS)
        if answer is None or answer.get("ready") is not True:
            self.close()
            detail = "its worker did not start" if answer is None else str(answer.get("detail"))
            raise RewardError(f"the predicate cannot be loaded: {detail}", where=self.predicate.file, fix="mend its source")
        self._worker = worker

    def close(self) -> None:
        """End the worker; a later call starts another."""
        self._worker = None
        if self._finalizer is not None:
            self._finalizer()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Worker:
    """The worker process, and lines to and from it."""

    def __init__(self) -> None:
        self.place = tempfile.mkdtemp(prefix="trimtab-sandbox-")
        script = Path(__file__).with_name("sandbox_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, bufsize=0,
            cwd=self.place, env=ENVIRONMENT | {"TMPDIR": self.place},
        )  # fmt: skip

    def ask(self, line: bytes, seconds: float) -> dict[str, Any] | None:
        """Send a line and wait for one; None if the worker is dead, or silent for so long, or does not make sense."""
        assert self.process.stdin is not None
        try:
            while line:
                line = line[self.process.stdin.write(line) or 0 :]
            answer = json.loads(self._line(time.monotonic() + seconds))
        except (OSError, ValueError):
            return None
        return answer if isinstance(answer, dict) else None

    def _line(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        text = b""
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            if not piece:
                return b""
            text += piece
        return text

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        shutil.rmtree(self.place, ignore_errors=True)


def _verdict(answer: dict[str, Any]) -> Verdict:
    failure = answer.get("failure")
    if failure is not None:
        return Verdict(None, failure, str(answer.get("detail", "")))
    value: Any = answer.get("verdict", answer.get("score"))
    return Verdict(value if isinstance(value, bool) else float(value))
