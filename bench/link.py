"""How the parent and its workers talk: one JSON object a line, each command answered by one reply.

Every side of a comparison is a process of its own, so that allocator, threads and peak memory are its own. The parent decides
whose turn it is; between turns a worker waits, reading its standard input. Imports nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[1]
Reply = dict[str, Any]


class WorkerError(RuntimeError):
    """A worker could not do what it was asked; the message holds its last words."""


class Worker:
    """The parent's end: a module run as `python -m MODULE`, which answers commands."""

    def __init__(
        self,
        module: str,
        log: Path,
        *,
        python: str = sys.executable,
        path: Sequence[Path] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.module, self.log = module, log
        log.parent.mkdir(parents=True, exist_ok=True)
        search = os.pathsep.join(map(str, [*path, ROOT, ROOT / "src"]))
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TRL_EXPERIMENTAL_SILENCE": "1"}
        self.process = subprocess.Popen(
            [python, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("ab"),
            text=True,
            cwd=ROOT,
            env={**os.environ, **offline, "PYTHONPATH": search, **(environment or {})},
        )

    def ask(self, command: str, **details: Any) -> Reply:
        """Send a command and wait for its reply. Raises WorkerError if the worker failed or ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"command": command, **details}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._last_words()) from None
        while (line := self.process.stdout.readline()) and not line.startswith("{"):
            pass  # printed while a library was imported, before the worker turned its output away
        if not line:
            raise WorkerError(self._last_words())
        reply: Reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.module}: {reply['error']}")
        return reply

    def close(self) -> None:
        """Let the worker end; one that does not is killed."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.close()
            self.process.wait(timeout=30)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self.process.kill()
            self.process.wait()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _last_words(self) -> str:
        status = self.process.wait()
        words = self.log.read_text(errors="replace")[-1500:] if self.log.exists() else ""
        killed = " (killed: out of memory?)" if status == -9 else ""
        return f"{self.module} ended with status {status}{killed}; its last words: {words}"


class Channel:
    """A worker's end. What libraries print must not mix with replies, so standard output is turned to standard error."""

    def __init__(self) -> None:
        self.replies: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)

    def receive(self) -> dict[str, Any] | None:
        """The next command, or None when the parent is done."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def reply(self, **details: Any) -> None:
        self.replies.write(json.dumps(details) + "\n")


def serve(commands: Mapping[str, Callable[..., Reply]]) -> None:
    """Answer commands one by one until the parent is done."""
    channel = Channel()
    while (request := channel.receive()) is not None:
        try:
            channel.reply(**commands[request.pop("command")](**request))
        except Exception:
            channel.reply(error=traceback.format_exc())


class Meter:
    """Seconds and the highest resident memory of one step of this process (and what a GPU held, where there is one)."""

    def start(self) -> None:
        self._cuda("reset_peak_memory_stats")
        Path("/proc/self/clear_refs").write_text("5")  # forgets the high-water mark
        self._cuda("synchronize")
        self.begin = time.perf_counter()

    def stop(self) -> Reply:
        self._cuda("synchronize")
        measured = {"seconds": time.perf_counter() - self.begin, "peak_bytes": resident("VmHWM")}
        gpu = self._cuda("max_memory_allocated")
        return measured if gpu is None else {**measured, "gpu_peak_bytes": gpu}

    @staticmethod
    def _cuda(function: str) -> Any:
        torch = sys.modules.get("torch")
        return getattr(torch.cuda, function)() if torch is not None and torch.cuda.is_initialized() else None


def resident(line: str = "VmRSS") -> int:
    """Resident memory of this process in bytes: now (VmRSS), or the highest since the last `Meter.start` (VmHWM)."""
    for text in Path("/proc/self/status").read_text().splitlines():
        if text.startswith(line):
            return int(text.split()[1]) * 1024
    raise RuntimeError(f"no {line} in /proc/self/status")
