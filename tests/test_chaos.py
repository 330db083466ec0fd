"""Runs of every kind are killed (SIGKILL) at random instants, resumed until they are done, and compared with runs that were left alone."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import resuming
import watched
from watched import COPYING, EVALUATION, PRUNING, PUBLISHING, START, STEP, WRITING, Watch

AIMS: dict[str, Callable[[str, str], bool]] = {
    START: lambda run, writer: run == START,
    STEP: lambda run, writer: run == STEP,
    EVALUATION: lambda run, writer: run == EVALUATION,
    COPYING: lambda run, writer: run == COPYING and writer == watched.IDLE,
    WRITING: lambda run, writer: writer == WRITING,
    PUBLISHING: lambda run, writer: writer == PUBLISHING,
    PRUNING: lambda run, writer: writer == PRUNING,
}
"""What a run is seen to be at when it is killed, or a moment later."""

DELAY = {START: 3.0, STEP: 0.02, EVALUATION: 0.005}
"""The moment in seconds, at most; that of the others is short, as saves are."""

SUPERVISED = ("sft", "reward", "dpo", "bco")


@dataclass(frozen=True)
class Kill:
    """What a run and its writer of checkpoints were at when it was killed, and whether a half-written folder was left."""

    run: str
    writer: str
    left: bool

    @property
    def saving(self) -> bool:
        return self.run == COPYING or self.writer != watched.IDLE


def trimtab(words: list[str], place: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_CACHE": str(place / "cache")}
    script = str(Path(watched.__file__))
    return subprocess.Popen(
        [sys.executable, script, str(place / "watch"), *words],
        cwd=place,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


def kill_once(words: list[str], place: Path, aim: str, steps: int, delay: float) -> Kill | None:
    """Kill a run a moment after it has been seen at something, so many steps after it began; None if it was done before."""
    watch, metrics = Watch(place / "watch"), place / "ended" / "metrics.jsonl"
    process = trimtab(words, place)
    there = None
    while process.poll() is None:
        run, writer = watch.read()
        if run != START and there is None:
            there = _lines(metrics)
        if AIMS[aim](run, writer) and (aim == START or _lines(metrics) >= (there or 0) + steps):
            time.sleep(delay)
            break
        time.sleep(0.02 if run == START else 0.0002)
    process.kill()
    process.communicate()
    if process.returncode == 0:
        return None
    assert process.returncode == -9, f"{words} ended by itself"
    return Kill(*watch.read(), left=any((place / "ended/checkpoints").glob(".step-*")))


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def longer(kind: str) -> tuple[str, ...]:
    """Settings with which a run of a kind has enough steps to be killed several times."""
    more = {"fit.steps=5": "fit.steps=25", "steps=5": "steps=15", "rounds=4": "rounds=12"}
    return ("checkpoint.every=2", *(more[word] for word in resuming.KINDS[kind] if word in more))


def chaos(kind: str, place: Path, aims: Sequence[str], seed: int) -> tuple[list[Kill], list[str]]:
    """Kill a run once for every aim, as long as it is not done; returns the kills, and in what the outcome differs."""
    draw, kills = random.Random(f"{kind} {seed}"), list[Kill]()
    finish(trimtab(resuming.command(kind, "whole", *longer(kind)), place))
    words = resuming.command(kind, "ended", "resume=auto", *longer(kind))
    for aim in aims:
        delay = draw.uniform(0, DELAY.get(aim, 0.002))
        kill = kill_once(words, place, aim, draw.randint(0, 3), delay)
        if kill is None:
            break
        kills.append(kill)
    finish(trimtab(words, place))
    ended, whole = (resuming.outcome(place / name) for name in ("ended", "whole"))
    differs = [f"{kind}: {part} differ after {kills}" for part in whole if ended[part] != whole[part]]
    left = [path.name for path in (place / "ended/checkpoints").glob(".*")]
    return kills, differs + ([f"{kind}: {left} are left after {kills}"] if left else [])


def aims(kind: str, seed: int) -> list[str]:
    """What a run of a kind is killed at, in random order."""
    command = resuming.KINDS[kind][0]
    draw = random.Random(f"aims {kind} {seed}")
    wanted = [EVALUATION if command in SUPERVISED else START, STEP, COPYING, WRITING, draw.choice((PUBLISHING, PRUNING))]
    draw.shuffle(wanted)
    return wanted


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_killed_and_resumed(kind: str, tmp_path: Path) -> None:
    resuming.prepare(tmp_path)
    kills, failures = chaos(kind, tmp_path, aims(kind, 0)[:2], seed=0)
    assert kills
    assert not failures


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_a_hundred_instants(tmp_path: Path) -> None:
    """In steps, evaluations and every part of a save: no kind of run comes out different."""
    kills, failures = list[Kill](), list[str]()
    for number, kind in enumerate(resuming.KINDS):
        place = tmp_path / str(number)
        place.mkdir()
        resuming.prepare(place)
        if number:  # what is compiled once
            shutil.copytree(tmp_path / "0/cache/kernels", place / "cache/kernels")
        more, differs = chaos(kind, place, aims(kind, 1), seed=1)
        kills, failures = kills + more, failures + differs
        print(f"{kind}: {len(more)} kills, {differs or 'identical'}", flush=True)
    at = Counter(kill.run if kill.writer == watched.IDLE else f"{kill.run} beside {kill.writer}" for kill in kills)
    saves, left = sum(kill.saving for kill in kills), sum(kill.left for kill in kills)
    said = ", ".join(f"{what} {count}" for what, count in at.most_common())
    half = f"{saves} during a save, {left} left a half-written folder"
    print(f"{len(resuming.KINDS)} kinds, {len(kills)} kills ({half}), {len(failures)} failures: {said}")
    assert not failures
    assert len(kills) >= 50
    assert saves >= 25
    assert at[STEP] >= 5
    assert at[EVALUATION] >= 3
