"""Runs of every kind are killed (SIGKILL) at random instants, resumed until they are done, and compared with runs that were left alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import resuming

MARKS = ("metrics.jsonl", "samples.jsonl", "events.jsonl")


def trimtab(words: list[str], place: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_CACHE": str(place / "cache")}
    return subprocess.Popen([sys.executable, "-m", "trimtab", *words], cwd=place, env=environment, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said


def kill_once(process: subprocess.Popen[str], run: Path, delay: float) -> bool:
    """Kill a moment after the run has begun to write; False if it was done before."""
    before = sum((run / name).stat().st_size for name in MARKS if (run / name).exists())
    while process.poll() is None and sum((run / name).stat().st_size for name in MARKS if (run / name).exists()) <= before:
        time.sleep(0.005)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return process.returncode != 0


def chaos(kind: str, place: Path, kills: int, seed: int) -> int:
    """End a run `kills` times at most; returns how often it was. Fails if what comes out differs in anything."""
    draw = random.Random(f"{kind} {seed}")
    more = ("checkpoint.every=2", "fit.steps=25") if "fit.steps=5" in resuming.KINDS[kind] else ("checkpoint.every=2",)
    more = (*more, "steps=15") if "steps=5" in resuming.KINDS[kind] else more
    finish(trimtab(resuming.command(kind, "whole", *more), place))
    ended, words = 0, resuming.command(kind, "ended", "resume=auto", *more)
    for _ in range(kills):
        if not kill_once(trimtab(words, place), place / "ended", draw.uniform(0, 1.5)):
            break
        ended += 1
    finish(trimtab(words, place))
    assert resuming.outcome(place / "ended") == resuming.outcome(place / "whole"), f"{kind} differs after {ended} kills"
    return ended


@pytest.mark.parametrize("kind", ["sft", "ppo"])
def test_killed_and_resumed(kind: str, tmp_path: Path) -> None:
    resuming.prepare(tmp_path)
    assert chaos(kind, tmp_path, kills=2, seed=0) > 0


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_killed_at_fifty_instants(tmp_path: Path) -> None:
    trials = 0
    for number, kind in enumerate(resuming.KINDS):
        place = tmp_path / str(number)
        place.mkdir()
        resuming.prepare(place)
        trials += chaos(kind, place, kills=4, seed=1)
        print(f"{kind}: identical; {trials} kills so far, 0 failures", flush=True)
    assert trials >= 50
