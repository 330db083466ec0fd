"""The other side of `rewards.sandbox`, run as a script in a bare interpreter: standard library only.

Reads one JSON request a line, answers one JSON line. Every call runs in a fork of its own, in a folder of its own, under
limits of its own, and nothing of it is left when the answer is sent.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
LONGEST_ANSWER = 4096
FILE_BYTES = 16 << 20

Answer = dict[str, Any]


def main() -> None:
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what a predicate prints goes nowhere
        os.dup2(nowhere, stream)
    private = [requests.fileno(), answers.fileno(), nowhere]
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a call leaves behind becomes ours, to be ended
    settings = json.loads(requests.readline())
    predicate: Callable[..., Any] | None = None
    try:
        predicate = _compile(settings)
        _send(answers, {"ready": True})
    except BaseException as error:
        _send(answers, {"ready": False, "detail": _explained(error)})
        return
    for line in requests:
        _send(answers, _call(predicate, json.loads(line), settings, private))


def _compile(settings: Answer) -> Callable[..., Any]:
    if settings["folder"]:
        sys.path.insert(0, settings["folder"])
    names: dict[str, Any] = {"__name__": "predicate", "__file__": settings["file"]}
    exec(compile(settings["source"], settings["file"], "exec"), names)
    found = names.get(settings["name"])
    if not callable(found):
        raise NameError(f"{settings['name']!r} is not a function")
    return found  # type: ignore[no-any-return]


def _call(predicate: Callable[..., Any], arguments: list[Any], settings: Answer, private: list[int]) -> Answer:
    """Run one call in a fork; whatever happens to it, an answer comes in time."""
    place = tempfile.mkdtemp()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(predicate, arguments, settings, private, place, writer)
    os.close(writer)
    try:
        text, late = _read(reader, time.monotonic() + settings["seconds"])
    finally:
        os.close(reader)
        status = _end(child)
        shutil.rmtree(place, ignore_errors=True)
    if late:
        return {"failure": "timeout", "detail": f"it took more than {settings['seconds']} s"}
    try:
        answer: Answer = json.loads(text)
    except ValueError:  # nothing was written, or not by us
        return _death(status)
    return answer if isinstance(answer, dict) else _death(status)


def _read(reader: int, deadline: float) -> tuple[bytes, bool]:
    """What the child wrote, and whether the time was up first."""
    text = b""
    while len(text) <= LONGEST_ANSWER:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return text, True
        piece = os.read(reader, LONGEST_ANSWER)
        if not piece or piece.endswith(b"\n"):
            return text + piece, False
        text += piece
    return b"", False


def _child(predicate: Callable[..., Any], arguments: list[Any], settings: Answer, private: list[int], place: str, writer: int) -> None:
    answer: Answer
    try:
        os.setsid()
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        for descriptor in private:
            os.close(descriptor)
        os.chdir(place)
        os.environ.update(HOME=place, TMPDIR=place)
        tempfile.tempdir = None
        _limit(settings)
        answer = _judged(predicate(*arguments))
    except BaseException as error:
        answer = {"failure": "memory" if isinstance(error, MemoryError) else "raised", "detail": _explained(error)}
    try:
        os.write(writer, json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(0)


def _limit(settings: Answer) -> None:
    memory, cpu = settings["memory_mb"] << 20, settings["cpu_seconds"]
    for what, soft, hard in (
        (resource.RLIMIT_AS, memory, memory),
        (resource.RLIMIT_CPU, cpu, cpu + 1),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        most = resource.getrlimit(what)[1]
        within = hard if most == resource.RLIM_INFINITY else min(hard, most)
        resource.setrlimit(what, (min(soft, within), within))


def _judged(value: Any) -> Answer:
    if isinstance(value, bool):
        return {"verdict": value}
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return {"failure": "no number", "detail": f"it returned {repr(value)[:200]}"}
    if not math.isfinite(number):
        return {"failure": "no number", "detail": f"it returned {number}"}
    return {"score": number}


def _end(child: int) -> int:
    """End a call and all it has started; the exit status of the call itself."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)  # it may not have come to making a group of its own
    _, status = os.waitpid(child, 0)
    for _ in range(100):
        orphans = _children()
        for orphan in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(orphan, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            break
        time.sleep(0.001)
    return status


def _children() -> list[int]:
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(word) for word in listed.read_text().split()] if listed.exists() else []


def _death(status: int) -> Answer:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return {"failure": "cpu", "detail": "it used up its CPU time"}
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {os.waitstatus_to_exitcode(status)}"
    return {"failure": "died", "detail": f"it ended without an answer ({how})"}


def _explained(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:200]


def _send(answers: Any, answer: Answer) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    main()
