"""Bad input: one clear error with a fix, exit status 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from trimtab.cli import main

GOOD_PAIR = {"prompt": "a", "chosen": "good", "rejected": "bad"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny")


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


PROMPT = lines({"prompt": "a"})
# name: (command, contents of data.jsonl, contents of reward.py, settings, what the error says)
CASES: dict[str, tuple[str, bytes, str, list[str], str]] = {
    "missing field": ("sft", lines({"prompt": "a"}), "", [], "data.jsonl:1"),
    "wrong type": ("sft", lines({"prompt": 3, "completion": "x"}), "", [], "data.jsonl:1, prompt"),
    "not JSON in row 2": ("sft", lines({"prompt": "a", "completion": "b"}) + b"{oops\n", "", [], "data.jsonl:2"),
    "not an object": ("sft", lines([1, 2]), "", [], "data.jsonl:1"),
    "empty file": ("sft", b"", "", [], "data.jsonl"),
    "bad UTF-8": ("sft", lines({"prompt": "a", "completion": "b"}) + b'{"prompt": "\xff\xfe"}\n', "", [], "data.jsonl:2"),
    "no such file": ("sft", b"", "", ["data.path=nowhere.jsonl"], "nowhere.jsonl"),
    "unknown kind of file": ("sft", b"", "", ["data.path=data.docx"], "data.docx"),
    "prompt longer than the context": ("ppo", lines({"prompt": "a" * 300}), "def f(p, r, row): return 0.0", [], "context of 256"),
    "answer longer than the context": ("dpo", lines({"prompt": "a", "chosen": "b" * 300, "rejected": "c"}), "", [], "reads at most 256"),
    "chosen equals rejected": ("reward", lines(GOOD_PAIR, {"prompt": "a", "chosen": "x", "rejected": "x"}), "", [], "data.jsonl:2"),
    "unknown setting": ("dpo", lines(GOOD_PAIR), "", ["optim.learning_rate=1"], "unknown setting 'optim.learning_rate'"),
    "wrong kind of value": ("dpo", lines(GOOD_PAIR), "", ["fit.batch_size=many"], "'fit.batch_size'"),
    "negative beta": ("dpo", lines(GOOD_PAIR), "", ["algorithm.beta=-0.1"], "'algorithm.beta' should be greater than 0"),
    "group size 0": ("ppo", PROMPT, "def f(p, r, row): return 0.0", ["responses_per_prompt=0"], "'responses_per_prompt'"),
    "setting of another loss": ("simpo", lines(GOOD_PAIR), "", ["algorithm.tau=1"], "unknown setting 'algorithm.tau'"),
    "pairs wanted, labels given": ("dpo", lines({"prompt": "a", "completion": "b", "label": True}), "", [], "use kto, bco or aot_unpaired"),
    "labels of one kind": ("kto", lines({"prompt": "a", "completion": "b", "label": True}), "", [], "all are desirable"),
    "one prompt and mismatched pairs": ("kto", lines(GOOD_PAIR), "", [], "give at least two prompts"),
    "unknown member of a mixture": ("mixture", lines(GOOD_PAIR), "", ["algorithm.members={dop: 1}"], "unknown loss 'dop'"),
    "member that moves the reference": ("mixture", lines(GOOD_PAIR), "", ["algorithm.members={tr_dpo: 1}"], "moves the reference"),
    "bad setting of a member": (
        "mixture", lines(GOOD_PAIR), "", ["algorithm.settings={dpo: {beta: 0}}"], "algorithm.settings.dpo: setting 'beta'"
    ),
    "a reference for odds": ("orpo", lines(GOOD_PAIR), "", ["algorithm.reference.role=frozen"], "reference.role must be none"),
    "missing model folder": ("dpo", lines(GOOD_PAIR), "", ["model.path=./no_model"], "no such model folder"),
    "folder without a model": ("dpo", lines(GOOD_PAIR), "", ["model.path=."], "config.json"),
    "no GPU": ("dpo", lines(GOOD_PAIR), "", ["model.device=cuda:7"], "no usable GPU"),
    "no reward": ("ppo", lines({"prompt": "a"}), "", ["reward.function=null"], "no reward is set"),
    "reward file missing": ("ppo", lines({"prompt": "a"}), "", ["reward.function=none.py:f"], "there is no file none.py"),
    "reward function missing": ("ppo", PROMPT, "def g(p, r, row): return 0.0", [], "it has: g"),
    "reward file does not import": ("ppo", lines({"prompt": "a"}), "import no_such_module", [], "cannot be imported"),
    "reward raises": ("ppo", PROMPT, "def f(p, r, row): return 1 / 0", [], "raised ZeroDivisionError"),
    "reward returns NaN": ("ppo", PROMPT, "def f(p, r, row): return float('nan')", [], "returned nan"),
    "reward returns text": ("ppo", PROMPT, "def f(p, r, row): return 'fine'", [], "not a number"),
    "reward returns the wrong number": ("ppo", PROMPT, "def f(p, r, row): return [0.0]", ["reward.batched=true"], "1 scores for 2"),
    "greedy rollouts": ("ppo", PROMPT, "def f(p, r, row): return 0.0", ["sampling.temperature=0"], "temperature must be above 0"),
    "unknown tracker": ("dpo", lines(GOOD_PAIR), "", ["trackers=[wandbb]"], "did you mean 'wandb'"),
    "no prompt at all": ("sample", b"", "", ["prompt=null"], "set either prompt or data.path"),
    "best of n without a reward folder": ("sample", b"", "", ["prompt=a", "n=2", "reward.model=./no_rm"], "no such model folder"),
    "partition without a reward": ("implicit-reward", lines(GOOD_PAIR), "", ["reward=null", "samples=4"], "samples need a reward"),
    "unknown command": ("pppo", b"", "", [], "did you mean 'ppo'"),
    "unknown option": ("dpo", lines(GOOD_PAIR), "", ["--force"], "unknown option '--force'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_one_clear_error(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, data, reward, settings, expected = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_bytes(data)
    Path("reward.py").write_text(reward)
    before = sorted(tmp_path.iterdir())
    base = [f"model.path={model}"]
    if command != "sample":
        base += ["data.path=data.jsonl", "output=run"]
    if command == "ppo":
        base += ["reward.function=reward.py:f", "sampling.max_tokens=8", "steps=1", "prompts_per_step=1", "responses_per_prompt=2"]
    assert main([command, *base, *settings]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert shown.count("error: ") == 1
    assert expected in shown
    assert "fix: " in shown
    assert "Traceback" not in shown
    written = [tmp_path / "run"] if (tmp_path / "run/failures").is_dir() else []  # the samples whose numbers are not finite
    assert sorted(tmp_path.iterdir()) == sorted([*before, *written])
    assert bool(written) == (name == "reward returns NaN")


def test_there_are_at_least_twenty() -> None:
    assert len(CASES) >= 20


def test_a_run_is_not_overwritten_unless_asked_and_survives_a_failed_try(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_bytes(lines(GOOD_PAIR))
    words = ["dpo", f"model.path={model}", "data.path=data.jsonl", "output=run"]
    assert main(words) == 0
    first = Path("run/metrics.jsonl").read_text()
    assert main(words) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main([*words, "--overwrite", "data.path=none.jsonl"]) == 2
    assert Path("run/metrics.jsonl").read_text() == first
    assert main([*words, "--overwrite", "optim.lr=1e-3"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.jsonl", "run"]
