"""The run directory: everything a run says, as files.

    config.yaml     the complete, resolved recipe: running it again repeats the run
    metrics.jsonl   one line per step; fields that measure time begin with "time/", all others repeat with the seed
    samples.jsonl   responses: prompt, response, reward and its parts, KL, tokens
    events.jsonl    what happened once: started, saved, finished, interrupted, failed
    failures/       samples with numbers that are not finite, by step
    checkpoints/    models; `last` is the newest
    report.html     all of it to look at

Every line is flushed as it is written, so a killed run loses nothing but perhaps its last, torn line. A number that is
not finite is stored as null, because JSON has no other word for it. Reports, comparisons and tests read these files,
never live objects.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import yaml

from trimtab import snapshot
from trimtab.errors import RunError, TrimtabError
from trimtab.runs import aside
from trimtab.runs.aside import LOCK, Aside

if TYPE_CHECKING:
    from trimtab.protocols import Tracker

STREAMS = ("metrics", "samples", "events")
FRESH = ".config.yaml"
"""How the names of recipes begin that are being written."""
BARE = {LOCK, "config.yaml", "checkpoints", "failures", "tensorboard", "wandb", "mlflow", *(f"{stream}.jsonl" for stream in STREAMS)}
"""What lies in the folder of a run that has begun and done nothing yet."""


class RunDirectory:
    """Writes a run's files (it is a Tracker, and passes everything on to others), or reads those of an earlier run.

    As a context manager it records how the run ended and closes its files, also on Ctrl-C and on an error. A run that
    ends before its first step brings back the run it was to replace.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trackers: list[Tracker] = []
        self._files: dict[str, IO[str]] = {}
        self._aside: Aside | None = None  # the run this one replaces, until it has taken a step
        self._stepped = False
        self._held: IO[str] | None = None

    @classmethod
    def create(cls, path: str | Path, config_yaml: str, trackers: Sequence[Tracker] = (), *, overwrite: bool = False) -> RunDirectory:
        """Start a new run. With `overwrite`, an earlier run there is replaced once this one has taken its first step.

        One that a killed process had set aside, and whose successor has taken no step, is brought back first. Raises RunError if the
        folder holds something already, or cannot be written.
        """
        run = cls(Path(path))
        run.trackers = list(trackers)
        try:
            cls(run.path)._recover(begun=True)
            if run.path.exists() and not run._hardly_begun():
                run._set_aside(overwrite)
            (run.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            run._lock()
            for stream in STREAMS:
                run._files[stream] = run._writer(stream, "w")
            run._describe(config_yaml)
        except OSError as error:
            run._bring_back()
            raise RunError(f"cannot write here: {error.strerror}", where=str(path), fix="choose a folder you can write to") from None
        return run

    @classmethod
    def resume(cls, path: str | Path, config_yaml: str | None = None) -> tuple[RunDirectory, int]:
        """Go on with an earlier run: its streams are cut back to its newest whole checkpoint, whose step comes too.

        Where it has taken no step yet and was to replace another one, that stays set aside until it has.
        config_yaml: the recipe it goes on with, if that has changed. Checkpoints that are damaged are put aside. Raises RunError if there
        is no run, or nothing to go on from.
        """
        run = cls.open(path)
        try:
            run._lock()
            run._adopt()
            return run, run._go_back(config_yaml)
        except OSError as error:
            raise RunError(f"cannot write here: {error.strerror}", where=str(path), fix="make the folder writable") from None
        finally:
            if not run._files:
                run._unlock()
                if run._aside is not None:
                    run._aside.let_go()

    @classmethod
    def recover(cls, path: str | Path) -> None:
        """Bring back the run that a killed process had set aside, where there is no other in its place. Raises RunError if it cannot."""
        try:
            cls(Path(path))._recover(begun=False)
        except OSError as error:
            raise RunError(f"cannot write here: {error.strerror}", where=str(path), fix="make the folder writable") from None

    def _go_back(self, config_yaml: str | None) -> int:
        """To the newest whole checkpoint; returns its step, 0 if there was none yet."""
        checkpoints = self.path / "checkpoints"
        step, wrong = snapshot.last_good(checkpoints)
        if step is None and wrong:
            said = "; ".join(f"{folder.name}: {fault}" for folder, fault in wrong.items())
            raise RunError(f"no checkpoint is whole ({said})", where=str(self.path), fix="start anew, with another output or --overwrite")
        for folder in wrong:
            folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))
        snapshot.sweep(checkpoints)
        if config_yaml is not None:
            self._describe(config_yaml)
        for stream in STREAMS:
            self._cut(stream, None if stream == "events" else step or 0)
        self._files = {stream: self._writer(stream, "a") for stream in STREAMS}
        self._stepped = self._aside is None
        for folder, fault in wrong.items():
            self.event("checkpoint damaged", checkpoint=folder.name, fault=fault)
        return step or 0

    @classmethod
    def open(cls, path: str | Path) -> RunDirectory:
        """Read an earlier run. Raises RunError if there is none."""
        if not (Path(path) / "config.yaml").is_file():
            raise RunError("this is no run directory (it has no config.yaml)", where=str(path), fix="name the output folder of a stage")
        return cls(Path(path))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line of metrics: {"step": step, name: number, ...}."""
        self._stepped = True
        self._write("metrics", {"step": step, **{name: float(value) for name, value in metrics.items()}})
        self._drop_aside()  # now that this run has something of its own
        self._tell(lambda tracker: tracker.log(step, metrics))

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One line per response: {"step": step, "prompt": ..., "response": ..., ...}."""
        rows = list(rows)
        for row in rows:
            self._write("samples", {"step": step, **row})
        self._tell(lambda tracker: tracker.samples(step, rows))

    def event(self, kind: str, **details: Any) -> None:
        """One line, with the time of day in seconds: {"time": ..., "event": kind, ...}."""
        self._write("events", {"time": time.time(), "event": kind, **details})
        self._tell(lambda tracker: tracker.event(kind, **details))

    def rewind(self, step: int) -> None:
        """Cut metrics and samples back to the steps before this one. Events stay: they say what happened."""
        for stream in ("metrics", "samples"):
            self._files[stream].close()
            self._cut(stream, step)
            self._files[stream] = self._writer(stream, "a")
        self._tell(lambda tracker: tracker.rewind(step))

    def close(self) -> None:
        """Close the files and the other trackers."""
        self._tell(lambda tracker: tracker.close())
        self.trackers = []
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._unlock()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ended_early = error is not None and not self._stepped
        try:
            if error is None:
                self.event("finished")
            elif isinstance(error, KeyboardInterrupt):
                self.event("interrupted")
            else:
                self.event("failed", error=f"{type(error).__name__}: {error}")
        finally:
            self.close()
            if ended_early and self._aside is not None:
                self._bring_back()
            elif ended_early and isinstance(error, TrimtabError) and not error.samples:
                shutil.rmtree(self.path)  # a mistake found before the first step leaves no half-made run in the way
            self._drop_aside()

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics of every step so far."""
        return self._read("metrics")

    def sample_rows(self) -> list[dict[str, Any]]:
        """The recorded responses."""
        return self._read("samples")

    def events(self) -> list[dict[str, Any]]:
        """What happened."""
        return self._read("events")

    def config(self) -> dict[str, Any]:
        """The recipe. Raises RunError if it cannot be read."""
        try:
            loaded = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            loaded = None
        if not isinstance(loaded, dict):
            raise RunError("config.yaml is damaged", where=str(self.path), fix="restore it, or run the stage again")
        return loaded

    def _lock(self) -> None:
        """Hold the folder for this process. Raises RunError if another one does."""
        held = aside.locked(self.path)
        if held is None and aside.LOCKS:
            raise RunError("another process works on this run", where=str(self.path), fix="wait for it, or choose another output")
        self._held = held

    def _unlock(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def _writer(self, stream: str, mode: str) -> IO[str]:
        # A lone surrogate in a data row has no UTF-8; as a backslash escape it is valid JSON and reads back unchanged.
        return (self.path / f"{stream}.jsonl").open(mode, encoding="utf-8", errors="backslashreplace", newline="\n")

    def _cut(self, stream: str, step: int | None) -> None:
        """Shorten a stream to the lines before a step (null: to its whole lines)."""
        path = self.path / f"{stream}.jsonl"
        kept = 0
        with path.open("ab+") as file:
            file.seek(0)
            for line in file:
                try:
                    row = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n") or (step is not None and row["step"] >= step):
                    break
                kept += len(line)
            file.truncate(kept)

    def _describe(self, config_yaml: str) -> None:
        """Write the recipe, in one step: a folder that has it is a run."""
        with snapshot.new_file(self.path / "config.yaml") as file:
            file.write(config_yaml)

    def _hardly_begun(self) -> bool:
        """Whether nothing is here, or only what a process leaves that is ended before there is a recipe."""
        empty = {LOCK, *(f"{stream}.jsonl" for stream in STREAMS)}
        return all(
            not any(path.iterdir())
            if path.name == "checkpoints" and path.is_dir()
            else path.name.startswith(FRESH) or (path.name in empty and path.is_file() and not path.stat().st_size)
            for path in self.path.iterdir()
        )

    def _set_aside(self, overwrite: bool) -> None:
        if not (self.path / "config.yaml").exists():
            raise RunError("this folder holds something other than a run", where=str(self.path), fix="choose another output")
        if not overwrite:
            raise RunError("this folder already holds a run", where=str(self.path), fix="choose another output, or add --overwrite")
        self._lock()
        self._aside, self._held = Aside.set(self.path, self._held), None

    def _adopt(self) -> None:
        """Where this run has done nothing yet: the run that it was to replace, and still is."""
        for left in aside.left(self.path):
            if self._aside is None and self._nothing_done():
                self._aside = left
            else:
                left.keep()

    def _recover(self, *, begun: bool) -> None:
        """Bring back a run that was set aside by a process that is no more. begun: also where the new one has a recipe, but no step.

        Where the new one has done something, both are kept, and it is said where.
        """
        aside.sweep(self.path)
        for left in aside.left(self.path):
            there = self.path.exists() and not self._hardly_begun()
            if there and not (begun and self._nothing_done()):
                if begun:
                    left.keep()
                left.let_go()
                continue
            if self.path.exists():
                self._lock()
                self._unlock()
            left.bring_back()
            said = "a run that was to replace the one here was ended before its first step: the earlier one is back"
            print(f"{self.path}: {said}", file=sys.stderr)

    def _nothing_done(self) -> bool:
        """Whether this run has begun, and done nothing that would be missed."""
        return (
            all(path.name in BARE or path.name.startswith(FRESH) for path in self.path.iterdir())
            and not any(step for step in snapshot.steps(self.path / "checkpoints"))
            and not any(path.exists() and path.stat().st_size for path in (self.path / "metrics.jsonl", self.path / "samples.jsonl"))
            and not any(event["event"] == "finished" for event in self.events())
        )

    def _bring_back(self) -> None:
        if self._aside is not None:
            self._aside.bring_back()
            self._aside = None

    def _drop_aside(self) -> None:
        if self._aside is not None:
            self._aside.drop()
            self._aside = None

    def _tell(self, message: Callable[[Tracker], None]) -> None:
        """Pass a message on. A tracker that fails (no network, a full disk) is left out from then on; the run goes on."""
        for tracker in tuple(self.trackers):
            try:
                message(tracker)
            except Exception as error:  # a tracker is other people's code: anything may come out of it
                self.trackers.remove(tracker)
                name, text = type(tracker).__name__, f"{type(error).__name__}: {error}"
                self._write("events", {"time": time.time(), "event": "tracker failed", "tracker": name, "error": text})
                print(f"{name} failed and is left out from here on; the run goes on ({text})", file=sys.stderr)

    def _write(self, stream: str, row: Mapping[str, Any]) -> None:
        file = self._files[stream]
        try:
            file.write(json.dumps(_plain(row), ensure_ascii=False) + "\n")
            file.flush()
        except OSError as error:
            raise RunError(f"cannot write {stream}.jsonl: {error.strerror}", where=str(self.path), fix="free space on the disk") from error

    def _read(self, stream: str) -> list[dict[str, Any]]:
        path = self.path / f"{stream}.jsonl"
        if not path.exists():
            return []
        rows = []
        lines = path.read_bytes().split(b"\n")  # not splitlines, which also cuts at separators inside a response's text
        for number, line in enumerate(lines, 1):
            try:
                if line:
                    rows.append(json.loads(line))
            except ValueError:  # not JSON, or not UTF-8
                if number < len(lines):  # what follows the last newline is a killed run's torn line
                    raise RunError("not valid JSON", where=f"{path}:{number}", fix="remove the damaged line") from None
        return rows


def _plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers of any library become floats, those that are not finite null, other things text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None
