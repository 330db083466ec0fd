"""Rejection-sampling fine-tuning on a tiny model: what is kept, and that the reward rises over the rounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab.cli import main
from trimtab.config import load_recipe
from trimtab.errors import ConfigError, RewardError
from trimtab.stages.rejection import RejectionConfig, Rounds, rejection
from trimtab.stages.sample import select
from trimtab.types import Group, Prompt, Response, Score

REWARD = "def letters(prompt, response, row):\n    return float(sum(c in 'aeiou' for c in response))\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model", scale=1.0)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {w}"}) + "\n" for w in ("one", "two", "three", "four")))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def overrides(place: Path, *more: str) -> list[str]:
    return [
        f"model.path={place / 'model'}", f"data.path={place / 'prompts.jsonl'}", f"reward.function={place / 'reward.py'}:letters",
        f"output={place / 'run'}", "model.dtype=float32", "sampling.max_tokens=8", "rounds=3", "n=16", "batch_size=2", "epochs=4",
        "optim.lr=3e-3", *more,
    ]  # fmt: skip


def recipe(place: Path, *more: str) -> Any:
    return load_recipe(RejectionConfig, None, overrides(place, *more))


def test_reward_rises_over_rounds_and_selection_is_better_than_the_mean(place: Path) -> None:
    tracker = tiny.Recorder()
    final = rejection(recipe(place, "epochs=8", "optim.lr=1e-2"), place / "run", tracker)
    means = [row["reward/mean"] for row in tracker.metrics]
    assert len(means) == 4
    assert means == sorted(means)
    assert final["reward/mean"] == means[-1] > 2 * means[0]
    assert all(row["selection/reward"] > row["reward/mean"] for row in tracker.metrics)
    kls = [row["kl/mean"] for row in tracker.metrics]
    assert kls[0] == pytest.approx(0, abs=1e-5)
    assert 0 < kls[1] < kls[3]
    assert [row["progress/updates"] for row in tracker.metrics[:3]] == [16, 16, 16]
    assert "loss/nll" not in tracker.metrics[3]  # the last line only measures
    saved = AutoModelForCausalLM.from_pretrained(place / "run/checkpoints/last/model")
    assert torch.isfinite(saved(torch.tensor([[5, 6]])).logits).all()


def test_a_round_learns_exactly_what_was_kept(place: Path) -> None:
    """On all n responses kept, one full-batch step is a plain SFT step on every different sample."""
    rounds = Rounds(recipe(place, "n=3", "keep=3", "epochs=1", "batch_size=4", "prompts_per_round=2"), tiny.Recorder())
    plain = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    sampled = rounds.sample(0)
    assert len(sampled.groups) == 2
    total, count = torch.zeros(()), 0
    for group, kept in zip(sampled.groups, sampled.kept, strict=True):
        assert len(kept) == len({group.responses[i].tokens for i in range(3)})
        for i in kept:
            prompt, answer = list(group.prompt.tokens), list(group.responses[i].tokens)
            labels = torch.tensor([[-100] * len(prompt) + answer])
            total, count = total + plain(torch.tensor([[*prompt, *answer]]), labels=labels).loss.detach() * len(answer), count + len(answer)
    rounds.one(0)
    assert rounds.tracker.metrics[0]["loss/nll"] == pytest.approx(float(total) / count, abs=1e-5)


@pytest.mark.parametrize("arrangement", [("model.lora={rank: 4}",), ("model.dtype=bfloat16",), ("keep=4", "threshold=1")])
def test_every_arrangement_runs_more_than_one_round(place: Path, arrangement: tuple[str, ...]) -> None:
    tracker = tiny.Recorder()
    rejection(recipe(place, "rounds=2", "epochs=1", "checkpoint.every=1", "checkpoint.keep_last=3", *arrangement), place / "run", tracker)
    assert tracker.metrics[0]["kl/mean"] == pytest.approx(0, abs=0.05)
    assert tracker.metrics[1]["kl/mean"] != 0
    assert [details["checkpoint"] for kind, details in tracker.events if kind == "saved"] == ["step-000001", "step-000002"]


def scored(*totals: float, same: bool = False) -> tuple[list[Group], list[list[Score]]]:
    responses = tuple(Response((5 if same else 5 + i,), "x") for i in range(len(totals)))
    return [Group(Prompt((1,), "p"), responses)], [[Score(total) for total in totals]]


def test_select_keeps_the_best_different_ones_above_the_threshold() -> None:
    groups, scores = scored(1, 3, 2, 3)
    assert select(groups, scores) == [[1]]
    assert select(groups, scores, keep=3) == [[1, 3, 2]]
    assert select(groups, scores, keep=9, threshold=2) == [[1, 3, 2]]
    assert select(groups, scores, keep=2, threshold=9) == [[]]
    assert select(*scored(2, 2, 2, same=True), keep=3) == [[0]]


def test_nothing_above_the_threshold_is_an_error_that_says_how_far_off_it_is(place: Path) -> None:
    with pytest.raises(RewardError, match=r"scores at least 100.0 \(the best scores"):
        rejection(recipe(place, "threshold=100"), place / "run", tiny.Recorder())


@pytest.mark.parametrize(("setting", "what"), [("keep=17", "more than n"), ("sampling.temperature=0", "above 0")])
def test_settings_that_leave_no_choice_are_refused(place: Path, setting: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        recipe(place, setting)


def test_a_failing_predicate_shows_in_the_metrics_of_the_round(place: Path) -> None:
    code = "def vowels(prompt, response, row):\n    return 1 / sum(c in 'aeiou' for c in response)\n"
    config = recipe(place, "rounds=1", "reward.function=null", "reward.verifier.kind=python", f"reward.verifier.code={json.dumps(code)}")
    tracker = tiny.Recorder()
    rejection(config, place / "run", tracker)
    assert 0 < tracker.metrics[0]["reward/vowels_failed"] < 1
    assert tracker.metrics[0]["reward/vowels"] == pytest.approx(tracker.metrics[0]["reward/mean"], abs=1e-6)


def test_the_command_writes_a_run_directory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rejection", *overrides(place, "rounds=1", "n=4")]) == 0
    assert {"metrics.jsonl", "samples.jsonl", "report.html", "config.yaml"} <= {p.name for p in (place / "run").iterdir()}
    assert "selection/kept" in capsys.readouterr().out
