"""Ctrl-C leaves a run that can be used: metrics so far, a model, a report, and a word about how it ended.

Twice, and it loses the step at most: what goes on from there is the uninterrupted run, bit for bit.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import resuming
import tiny
from trimtab import interrupt
from trimtab.cli import main
from trimtab.engines.batching import Batcher
from trimtab.models.language import LanguageModel
from trimtab.rewards.function import FunctionReward
from trimtab.runs.directory import RunDirectory
from trimtab.training.optimiser import Optimiser


@pytest.mark.parametrize("stage", ["ppo", "sft", "rejection"])
def test_ctrl_c_leaves_a_usable_run(stage: str, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text(json.dumps({"prompt": "abc", "completion": "def"}) + "\n")
    (tmp_path / "reward.py").write_text("def f(p, r, row): return float(len(r))\n")
    own = {
        "ppo": ["reward.function=reward.py:f", "sampling.max_tokens=8", "steps=100000", "prompts_per_step=1"],
        "rejection": ["reward.function=reward.py:f", "sampling.max_tokens=8", "rounds=100000"],
        "sft": ["fit.steps=100000", "fit.batch_size=1"],
    }
    words = [stage, f"model.path={tmp_path / 'model'}", "data.path=data.jsonl", "output=run", *own[stage]]
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in shown
    run = RunDirectory.open(tmp_path / "run")
    assert run.events()[-1]["event"] == "interrupted"
    assert len(run.metrics()) >= 3
    assert (tmp_path / "run" / "report.html").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoints" / "last" / "model")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    resuming.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def signals_at(call: int, times: int, own: Callable[..., Any]) -> Callable[..., Any]:
    """A function at whose n-th call within the steps of a run the process is sent signals, before it does its work."""
    calls = 0

    def sent(*words: Any, **more: Any) -> Any:
        nonlocal calls
        calls += interrupt._stop is not None and interrupt._stop.stepping
        if calls == call and interrupt._stop is not None and interrupt._stop.signal is None:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return own(*words, **more)

    return sent


PLACES: dict[str, tuple[Any, str]] = {
    "sampling": (Batcher, "_draw"),
    "scoring": (FunctionReward, "score"),
    "forward": (LanguageModel, "forward"),
    "before the optimiser": (Optimiser, "grad_norm"),
}
ONE_BY_ONE = ("fit.micro_batch_tokens=8",)
CASES = {
    "sft, first micro-batch of the first step": ("sft", "forward", 1, 0, ONE_BY_ONE),
    "sft, second micro-batch": ("sft", "forward", 6, 1, ONE_BY_ONE),
    "sft in bfloat16, before the optimiser": ("sft in bfloat16", "before the optimiser", 3, 2, ()),
    "bco, running mean": ("bco", "before the optimiser", 3, 2, ()),
    "ppo, sampling": ("ppo", "sampling", 14, None, ()),
    "ppo, scoring": ("ppo", "scoring", 3, 2, ()),
    "ppo, adaptive beta and credit": ("ppo", "before the optimiser", 17, 2, ()),
    "ppo, running statistics": ("ppo, critic of its own", "before the optimiser", 5, None, ()),
    "grpo, first rollout": ("grpo", "scoring", 1, 0, ()),
    "grpo, running line of lengths": ("grpo", "before the optimiser", 3, 2, ()),
    "grpo, looking": ("grpo", "forward", 5, None, ()),
    "grpo, overlapping": ("grpo, overlapping", "before the optimiser", 3, 2, ()),
    "grpo, drafts": ("grpo, reusing", "before the optimiser", 3, 2, ()),
    "rejection, scoring": ("rejection", "scoring", 3, 2, ()),
    "rejection, before the optimiser": ("rejection", "before the optimiser", 3, 2, ()),
}


@cache
def uninterrupted(kind: str, *more: str) -> dict[str, Any]:
    """What such a run makes, wherever it runs."""
    assert main(resuming.command(kind, "whole", *more)) == 0
    return resuming.outcome(Path("whole"))


@pytest.mark.parametrize("case", CASES)
def test_ctrl_c_twice_abandons_the_step_and_loses_nothing_else(
    case: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, where, call, step, more = CASES[case]
    whole = uninterrupted(kind, *more)
    owner, name = PLACES[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signals_at(call, 2, getattr(owner, name)))
        assert main(resuming.command(kind, "ended", *more)) == 130
    assert "abandoning this step" in capsys.readouterr().err
    run = RunDirectory.open(place / "ended")
    saved = (place / "ended/checkpoints/last").resolve().name
    assert [event["event"] for event in run.events()][-2:] == ["step abandoned", "interrupted"]
    assert saved == f"step-{len(run.metrics()):06d}"
    assert step is None or len(run.metrics()) == step
    assert main(["resume", "ended", "checkpoint.every=1"]) == 0
    assert resuming.outcome(place / "ended") == whole


@pytest.mark.parametrize(("kind", "where", "call"), [("ppo", "before the optimiser", 3), ("dpo, reference moving", "forward", 3)])
def test_once_a_weight_has_changed_the_step_is_finished(
    kind: str, where: str, call: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = uninterrupted(kind)
    owner, name = PLACES[where]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, signals_at(call, 2, getattr(owner, name)))
        assert main(resuming.command(kind, "ended")) == 130
    assert "has changed weights already: finishing it" in capsys.readouterr().err
    run = RunDirectory.open(place / "ended")
    assert [event["event"] for event in run.events()][-2:] == ["saved", "interrupted"]
    assert main(["resume", "ended"]) == 0
    assert resuming.outcome(place / "ended") == whole


def test_the_third_leaves_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Optimiser, "grad_norm", signals_at(3, 3, Optimiser.grad_norm))
        assert main(resuming.command("sft", "run")) == 130
    run = RunDirectory.open(place / "run")
    assert len(run.metrics()) == 2
    assert not list((place / "run/checkpoints").iterdir())


def test_a_reward_that_hangs_does_not_hold_up_the_second(place: Path) -> None:
    (place / "reward.py").write_text(
        "import time\n\ndef letters(prompt, response, row):\n    open('scoring', 'a').write('.')\n    time.sleep(300)\n    return 0.0\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", *resuming.command("grpo", "run")],
        cwd=place,
        stderr=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    )
    deadline = time.monotonic() + 60
    while not (place / "scoring").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (place / "run/checkpoints/last").resolve().name == "step-000000"


def test_outside_a_run_nothing_is_deferred() -> None:
    interrupt.pause()
    interrupt.commit()
    with pytest.raises(KeyboardInterrupt), interrupt.at_once():
        signal.raise_signal(signal.SIGINT)
