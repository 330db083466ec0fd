"""Checkpoints that hold everything that decides the future of a run, and the one rule when they are written.

    checkpoints/step-000100/   after 100 steps
        model/, critic/, ...   models in Hugging Face layout
        state.safetensors      float32 masters, Adam's moments, moving references
        state.json             everything else: running statistics, adaptive beta, rollouts begun
        manifest.json          step, versions, and the size and SHA-256 of every file
    checkpoints/last           the newest

Data order, sampling and every other draw follow from seed and step (`trimtab.seeds`): there is no random state to keep.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimtab import __version__, kernels, snapshot
from trimtab.config import Config
from trimtab.errors import RunError, TrimtabError
from trimtab.interrupt import Abandoned, Stop, deferred
from trimtab.models.reference import MovingReference
from trimtab.protocols import Stateful, Tracker
from trimtab.training.guards import Guards
from trimtab.training.optimiser import Optimiser

STATE_TENSORS, STATE = "state.safetensors", "state.json"
WEIGHTS = (Optimiser, MovingReference)
"""Parts that hold weights: they do not change before `interrupt.commit`."""


class Saveable(Protocol):
    def write(self, folder: Path) -> None:
        """Into an empty folder."""
        ...


class CheckpointConfig(Config):
    """When checkpoints are written, and which are kept. One is always written at the end, and when the run is interrupted."""

    every: int | None = Field(None, gt=0, description="steps between checkpoints")
    minutes: float | None = Field(10.0, gt=0, description="minutes after which a checkpoint follows the step (null: only every decides)")
    keep_last: int = Field(1, gt=0, description="how many of the newest are kept")
    keep_every: int | None = Field(None, gt=0, description="those after a multiple of this many steps are kept for good")
    keep_best: str | None = Field(None, description="a metric: the checkpoint at which it was best is kept")
    best: Literal["max", "min"] = Field("max", description="whether keep_best is better high or low")
    background: bool = Field(True, description="write to the disk beside the next steps")


class Checkpoints:
    """The checkpoints of one run.

    parts:  what decides the run's future, by name.
    models: what is saved to be used elsewhere, by folder.
    resume: auto: go on from the newest checkpoint that is there.
    """

    def __init__(
        self,
        run: Path,
        config: CheckpointConfig,
        tracker: Tracker,
        parts: Mapping[str, Stateful],
        models: Mapping[str, Saveable],
        *,
        resume: Literal["never", "auto"] = "never",
    ) -> None:
        self.resume = resume
        self.folder, self.config, self.tracker, self.parts, self.models = run / "checkpoints", config, tracker, parts, models
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[str] | None = None
        self._written: int | None = None
        self._since = time.monotonic()

    def start(self) -> int:
        """The steps taken before this one of the run's processes: those of its newest checkpoint, if it is to be gone on with."""
        return self.restore() if self.resume == "auto" else 0

    def restore(self) -> int:
        """Bring the newest checkpoint's state into the parts; returns the steps taken, 0 where there is no checkpoint."""
        found = snapshot.steps(self.folder)
        if not found:
            return 0
        step, folder = next(iter(found.items()))
        self._load(step, folder)
        was = snapshot.facts(folder)
        changed = {name: {"was": was.get(name), "is": now} for name, now in environment().items() if was.get(name) != now}
        if changed:
            self.tracker.event("environment changed", **changed)
        return step

    def go_back(self) -> int:
        """Bring the newest whole checkpoint's state back in the middle of a run; returns the steps that were taken then."""
        self.wait()
        step, wrong = snapshot.last_good(self.folder)
        if step is None:
            raise RunError("no checkpoint is whole: there is nothing to go back to", where=str(self.folder), fix="start anew")
        for folder in wrong:
            folder.rename(folder.with_name(f"{folder.name}.damaged-{time.time_ns()}"))
        self._load(step, snapshot.step_folder(self.folder, step))
        return step

    def begin(self) -> None:
        """Make sure that there is something to go back to."""
        if self._written is None:
            self.save(0, {})

    def _load(self, step: int, folder: Path) -> None:
        state = read_state(folder)
        for name, part in self.parts.items():
            if name not in state:
                raise RunError(f"the checkpoint has no state of {name!r}", where=str(folder), fix="resume with the recipe it was made with")
            part.load_state_dict(state[name])
        self._written = step

    def after(self, step: int, metrics: Mapping[str, float], *, last: bool = False) -> None:
        """After a step (counted from 1) with these metrics: save if it is time."""
        every, minutes = self.config.every, self.config.minutes
        due = (every is not None and step % every == 0) or (minutes is not None and time.monotonic() - self._since >= 60 * minutes)
        if (last or due) and self._written != step:
            self.save(step, metrics)
        if last:
            self.wait()

    def mark(self) -> dict[str, Any] | None:
        """The state of a step's start, but for the weights; None where it is not known, because what is begun has failed."""
        try:
            return {name: part.state_dict() for name, part in self.parts.items() if not isinstance(part, WEIGHTS)}
        except TrimtabError:  # the step will say so
            return None

    def abandoned(self, step: int, marked: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """A step (counted from 0) was left before it changed a weight: save the state of its start."""
        if self._written != step:
            self.save(step, metrics, marked)
        self.wait()
        self.tracker.event("step abandoned", step=step)

    def save(self, step: int, metrics: Mapping[str, float], marked: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint. What could change is copied before this returns; the rest goes on beside the next steps.

        marked: states that take the place of the parts' own.
        """
        self.wait()
        target = snapshot.step_folder(self.folder, step)
        staging = snapshot.stage(target)
        try:
            for name, model in self.models.items():
                (staging / name).mkdir()
                model.write(staging / name)
            known = marked or {}
            states = {name: known[name] if name in known else part.state_dict() for name, part in self.parts.items()}
            tree, tensors = _split(states, copy=self.config.background)
        except snapshot.WRITING as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise self._failed(target, error) from error
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        value = metrics.get(self.config.keep_best) if self.config.keep_best else None
        facts = {"step": step, "metric": value, **environment()}
        self._written, self._since = step, time.monotonic()
        self._writing = self._writer.submit(self._finish, staging, target, tree, tensors, facts)
        if not self.config.background:
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk. Raises what went wrong with it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            target = writing.result()
            self.tracker.event("saved", checkpoint=target)

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    @staticmethod
    def _failed(target: Path, error: BaseException) -> RunError:
        said = f"cannot save a checkpoint: {snapshot.reason(error)}; the one before it is kept"
        return RunError(said, where=str(target), fix="free space, then `trimtab resume`")

    def _finish(self, staging: Path, target: Path, tree: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> str:
        try:
            (staging / STATE).write_text(json.dumps(tree), encoding="utf-8")
            save_file(tensors, staging / STATE_TENSORS)
            snapshot.seal(staging, facts)
            snapshot.publish(staging, target)
            point_at(target)
            for path in superfluous(self.folder, self.config):
                snapshot.remove(path)
        except snapshot.WRITING as error:
            raise self._failed(target, error) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return target.name


def each_step(
    one: Callable[[int], dict[str, float]], start: int, total: int, checkpoints: Checkpoints | None, guards: Guards | None = None
) -> dict[str, float]:
    """Take the steps that are left, saving when it is time, and going back from spikes; returns the last one's metrics.

    Ctrl-C and SIGTERM let the step end (the second time: let it be abandoned) and are raised when it is saved; where nothing is saved they
    interrupt at once, as a loop within a step of another does.
    """
    metrics: dict[str, float] = {}
    step = start
    try:
        with deferred() if checkpoints is not None else nullcontext(Stop()) as stop:
            if checkpoints is not None and guards is not None and guards.watching and start < total:
                checkpoints.begin()
            while step < total:
                if guards is not None:
                    guards.begin(step)
                marked = checkpoints.mark() if checkpoints is not None else None
                try:
                    with stop.step(abandonable=marked is not None):
                        metrics = one(step)
                except Abandoned:
                    if checkpoints is not None and marked is not None:
                        checkpoints.abandoned(step, marked, metrics)
                    raise
                if checkpoints is not None and guards is not None and guards.spike is not None:
                    step = guards.go_back(step, checkpoints.go_back)
                    ending = True  # what it went back to is on the disk
                else:
                    step += 1
                    ending = step == total or stop.signal is not None  # asked once: a signal that comes later waits for the next step
                    if checkpoints is not None:
                        checkpoints.after(step, metrics, last=ending)
                if ending:
                    stop.check()
        stop.check()  # one that came after the last step
    finally:
        if checkpoints is not None:
            checkpoints.close()
    return metrics


def point_at(checkpoint: Path) -> None:
    """Let `last` name this checkpoint, in one step."""
    link = checkpoint.parent / ".last"
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name, target_is_directory=True)
    os.replace(link, checkpoint.parent / "last")


def superfluous(checkpoints: Path, config: CheckpointConfig) -> list[Path]:
    """Checkpoints that need not be kept."""
    found = snapshot.steps(checkpoints)
    kept = set(list(found)[: config.keep_last])
    if config.keep_every:
        kept |= {step for step in found if step % config.keep_every == 0}
    if config.keep_best:
        values = {step: snapshot.facts(path).get("metric") for step, path in found.items()}
        known = {step: value for step, value in values.items() if value is not None}
        if known:
            kept.add((max if config.best == "max" else min)(known, key=lambda step: known[step]))
    return [path for step, path in found.items() if step not in kept]


def environment() -> dict[str, Any]:
    """What decides rounding beside the recipe: a continuation is the same bit for bit only where these are the same."""
    import transformers

    return {
        "trimtab": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "kernels": kernels.library() is not None,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def read_state(folder: Path) -> dict[str, Any]:
    """The state of all parts. Raises RunError if it cannot be read."""
    try:
        tensors = load_file(folder / STATE_TENSORS)
        state: dict[str, Any] = _join(json.loads((folder / STATE).read_text(encoding="utf-8")), tensors)
    except Exception as error:  # safetensors raises its own kind for a damaged header
        raise RunError(
            f"the checkpoint's state cannot be read: {error}", where=str(folder), fix="remove it; the one before is taken"
        ) from error
    return state


def _split(state: Any, *, copy: bool, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """A tree of tensors and JSON values as a tree of JSON values and the tensors by path."""
    if isinstance(state, Tensor):
        held = state.detach()
        held = held.to("cpu", copy=True) if copy or held.device.type != "cpu" else held
        return {_TENSOR: path}, {path: held.contiguous()}
    if isinstance(state, Mapping | Sequence) and not isinstance(state, str):
        items = state.items() if isinstance(state, Mapping) else enumerate(state)
        parts = {key: _split(value, copy=copy, path=f"{path}/{key}" if path else str(key)) for key, value in items}
        tensors = {name: tensor for _, found in parts.values() for name, tensor in found.items()}
        tree = {key: part for key, (part, _) in parts.items()}
        return (tree if isinstance(state, Mapping) else list(tree.values())), tensors
    return state, {}


def _join(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, dict):
        return tensors[tree[_TENSOR]] if set(tree) == {_TENSOR} else {key: _join(value, tensors) for key, value in tree.items()}
    return [_join(value, tensors) for value in tree] if isinstance(tree, list) else tree


_TENSOR = "tensor in the other file"
