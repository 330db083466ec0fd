"""The example in CONTRIBUTING.md, as it is printed, is a whole algorithm: one file and one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tiny

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package to which the example was added."""
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## How to add an algorithm")[1].split("\n## ")[0]
    module, line = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    folder = tmp_path_factory.mktemp("copy")
    algorithms = shutil.copytree(ROOT / "src" / "trimtab", folder / "trimtab", ignore=shutil.ignore_patterns("__pycache__")) / "algorithms"
    (algorithms / "toy.py").write_text(module, encoding="utf-8")
    registry = (algorithms / "__init__.py").read_text(encoding="utf-8")
    start = "ALGORITHMS = {\n"
    assert start in registry
    (algorithms / "__init__.py").write_text(registry.replace(start, start + line), encoding="utf-8")
    return folder


def python(copy: Path, *arguments: str | Path) -> str:
    """What Python prints with the copy first on its path."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_command_and_its_settings_are_there(copy: Path) -> None:
    assert "toy" not in python(ROOT / "src", "-m", "trimtab", "--help")
    assert re.search(r"^ +toy +REINFORCE with a share", python(copy, "-m", "trimtab", "--help"), re.MULTILINE)
    settings = python(copy, "-m", "trimtab", "toy", "--help")
    assert re.search(r"algorithm\.share = 0\.5 +float, >= 0\S*, <= 1", settings)
    assert "how much of the group's mean return is subtracted" in settings
    assert "algorithm.kl.beta" in settings


def test_it_learns_two_steps_on_a_real_model(copy: Path, tmp_path: Path) -> None:
    model = tiny.folder(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {word}"}) + "\n" for word in ("one", "two")))
    (tmp_path / "reward.py").write_text("def short(prompt, response, row):\n    return -float(len(response))\n")
    files = [f"model.path={model}", f"data.path={tmp_path / 'prompts.jsonl'}", f"output={tmp_path / 'run'}"]
    sizes = ["steps=2", "prompts_per_step=2", "responses_per_prompt=3", "sampling.max_tokens=6", "optim.lr=1e-3", "model.dtype=float32"]
    reward = f"reward.function={tmp_path / 'reward.py'}:short"
    printed = python(copy, "-m", "trimtab", "toy", *files, *sizes, reward, "algorithm.share=0.25")
    assert "report.html" in printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert all(row["policy/grad_norm"] > 0 for row in rows)
    assert (tmp_path / "run" / "checkpoints" / "last" / "model" / "config.json").exists()


def test_it_is_held_to_what_every_algorithm_must_have(copy: Path) -> None:
    printed = python(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/algorithms/test_registry.py", "-k", "toy")
    assert int(re.search(r"(\d+) passed", printed)[1]) > 20  # type: ignore[index]
