"""Ctrl-C leaves a run that can be used: metrics so far, a model, a report, and a word about how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

import tiny
from trimtab.runs.directory import RunDirectory


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
