"""Implicit rewards: exact on a policy that is known to be optimal, and the partition function from samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab.batch import Batch
from trimtab.config import load_recipe
from trimtab.errors import ConfigError
from trimtab.maths.optimum import log_partition
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.stages.implicit import ImplicitConfig, implicit_reward
from trimtab.types import Group, Response

BETA = 0.5
REWARD = "def f(prompt, response, row):\n    return (ord(response[0]) % 7) / 3 if response else 0.25\n"


def score(text: str) -> float:
    return (ord(text[0]) % 7) / 3 if text else 0.25


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A reference, and the policy that is optimal for REWARD against it at one prompt, where responses are single tokens."""
    tiny.folder(tmp_path / "reference", dtype=torch.float64, tie_word_embeddings=False)
    model = LanguageModel.load(ModelConfig(path=str(tmp_path / "reference"), dtype="float64"), template="plain")
    prompt = model.template.prompt("go ")
    texts = [model.template.decode((i,)) for i in range(tiny.VOCABULARY)]
    reward = torch.tensor([score(text) for text in texts], dtype=torch.float64)
    with torch.no_grad():
        states, _ = model.predictors(Batch((Group(prompt, (Response((5,), ""),)),)))
        h = states[0]
        model.plain.lm_head.weight += torch.outer(reward / BETA, h) / (h @ h)  # adds r / beta to the logits at this prompt
    model.save(tmp_path / "policy")
    (tmp_path / "reward.py").write_text(REWARD)
    cut = {"chosen_truncated": True, "rejected_truncated": True}
    pairs = [("a", "b"), ("x", "y"), ("q", "a"), ("7", "z")]
    (tmp_path / "pairs.jsonl").write_text(
        "".join(json.dumps({"prompt": "go ", "chosen": a, "rejected": b, **cut}) + "\n" for a, b in pairs)
    )
    return tmp_path


def recipe(place: Path, *overrides: str) -> Any:
    settings = [
        f"model.path={place / 'policy'}", f"reference.path={place / 'reference'}", "model.dtype=float64", "reference.dtype=float64",
        f"data.path={place / 'pairs.jsonl'}", "data.template=plain", f"beta={BETA}", f"output={place / 'out.jsonl'}",
    ]  # fmt: skip
    return load_recipe(ImplicitConfig, None, [*settings, *overrides])


def exact_log_z(place: Path) -> float:
    model = LanguageModel.load(ModelConfig(path=str(place / "reference"), dtype="float64"), template="plain")
    every = tuple(Response((i,), model.template.decode((i,))) for i in range(tiny.VOCABULARY))
    with torch.no_grad():
        ref = model.forward(Batch((Group(model.template.prompt("go "), every),))).logprobs
    assert float(ref.exp().sum()) == pytest.approx(1)
    return float(log_partition(torch.tensor([score(r.text) for r in every], dtype=torch.float64), ref, BETA))


def test_an_optimal_policy_gives_its_reward_back(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = implicit_reward(recipe(place))
    rows = [json.loads(line) for line in (place / "out.jsonl").read_text().splitlines()]
    shift = BETA * exact_log_z(place)
    for row in rows:
        expected = [score(text) for text in row["responses"]]
        assert [r + shift for r in row["implicit_rewards"]] == pytest.approx(expected, abs=1e-9)
        assert row["margins"] == pytest.approx([expected[0] - expected[1]], abs=1e-9)
    right = sum(score(row["responses"][0]) > score(row["responses"][1]) for row in rows)
    assert 0 < right < len(rows)
    assert summary["accuracy"] == right / len(rows)
    assert summary["accuracy_low"] < summary["accuracy"] < summary["accuracy_high"]
    assert "log_z" not in summary
    assert "margins are exact" in capsys.readouterr().out


def test_the_partition_function_is_estimated_with_its_error(place: Path) -> None:
    settings = [f"reward.function={place / 'reward.py'}:f", "samples=4000", "max_tokens=1"]
    summary = implicit_reward(recipe(place, *settings))
    exact = exact_log_z(place)
    assert 0 < summary["log_z_error"] < 0.05
    assert abs(summary["log_z"] - exact) < 4 * summary["log_z_error"]
    assert summary["log_z_effective_samples"] > 100
    for row in map(json.loads, (place / "out.jsonl").read_text().splitlines()):
        assert row["rewards"] == [score(text) for text in row["responses"]]
        assert row["implicit_rewards_with_z"] == pytest.approx(row["rewards"], abs=4 * BETA * row["log_z_error"])
    again = implicit_reward(recipe(place, *settings))
    assert again == summary
    assert implicit_reward(recipe(place, *settings, "seed=1"))["log_z"] != summary["log_z"]


def test_responses_without_judgement_have_rewards_and_no_accuracy(place: Path) -> None:
    rows = [{"prompt": "go ", "completion": "on"}, {"prompt": "go ", "responses": ["a", "b", "b"], "truncated": [True, False, False]}]
    (place / "plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = implicit_reward(recipe(place, f"data.path={place / 'plain.jsonl'}", "judged=false"))
    assert summary.keys() == {"prompts", "responses", "implicit_reward"}
    one, three = map(json.loads, (place / "out.jsonl").read_text().splitlines())
    assert [len(row["implicit_rewards"]) for row in (one, three)] == [1, 3]
    assert not {"margins", "scores"} & (one.keys() | three.keys())


def test_the_reference_itself_has_no_reward(place: Path) -> None:
    summary = implicit_reward(recipe(place, f"model.path={place / 'reference'}"))
    assert summary["implicit_reward"] == summary["margin"] == 0


@pytest.mark.parametrize(("setting", "says"), [("samples=1", "no standard error"), ("samples=8", "need a reward")])
def test_samples_that_tell_nothing_are_refused(place: Path, setting: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        recipe(place, setting)
