"""`trimtab explain`: what is written of a step adds up, for every algorithm, and can be read in the terminal and as a page."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import tiny
from trimtab.algorithms import ALGORITHMS
from trimtab.cli import main

CAUSES = ("reward", "kl", "value", "baseline")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("explain")
    tiny.folder(place / "model")
    (place / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {w}"}) + "\n" for w in ("one", "two", "three", "four")))
    (place / "reward.py").write_text("def letters(prompt, response, row):\n    return float(sum(c in 'aeiou' for c in response))\n")
    return place


def run(place: Path, name: str, *overrides: str) -> list[dict]:
    settings = [
        f"model.path={place / 'model'}", f"data.path={place / 'prompts.jsonl'}", f"reward.function={place / 'reward.py'}:letters",
        f"output={place / name}", "model.dtype=float64", "sampling.max_tokens=8", "steps=3", "prompts_per_step=4",
        "responses_per_prompt=4", "optim.lr=1e-2", "samples_every=2", "explain_prompts=2", "algorithm.epochs=2",
    ]  # fmt: skip
    assert main([name, *settings, *overrides, "--overwrite"]) == 0
    return [json.loads(line) for line in (place / name / "steps" / "step-000002.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_parts_of_every_advantage_sum_to_it(place: Path, name: str) -> None:
    rows = run(place, name)
    assert len(rows) == 2 * 4
    for row in rows:
        for t, advantage in enumerate(row["advantage"]):
            assert sum(row[f"advantage_{cause}"][t] for cause in CAUSES) == pytest.approx(advantage, abs=1e-9)
        assert sum(row["reward_score"]) == pytest.approx(row["reward"])
        kl = sum(old - ref for old, ref in zip(row["logprob"], row["reference"], strict=True))
        assert sum(row["reward_kl"]) == pytest.approx(-0.05 * kl, abs=1e-9)
    assert any(abs(row["advantage_kl"][0]) > 1e-6 for row in rows)
    assert any(abs(row["advantage_reward"][0]) > 1e-6 for row in rows)


def test_td_errors_and_gradient_weights_are_ppos(place: Path) -> None:
    rows = run(place, "ppo", "algorithm.clip=0.02")
    held = 0
    for row in rows:
        values = [*row["value"], 0.0]
        for t, delta in enumerate(row["td_error"]):
            reward = row["reward_score"][t] + row["reward_kl"][t]
            assert delta == pytest.approx(reward + values[t + 1] - values[t], abs=1e-9)
            ratio, advantage = math.exp(row["now"][t] - row["logprob"][t]), row["advantage"][t]
            clipped = ratio > 1.02 if advantage > 0 else ratio < 0.98
            assert row["clipped"][t] == clipped
            assert row["gradient_weight"][t] == pytest.approx(0.0 if clipped else ratio * advantage, abs=1e-9)
            held += clipped
    assert 0 < held < sum(len(row["tokens"]) for row in rows)


def test_a_step_is_told_in_the_terminal_and_on_a_page(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run(place, "ppo")
    capsys.readouterr()
    assert main(["explain", str(place / "ppo"), "2", "--response", "3"]) == 0
    shown = capsys.readouterr().out
    assert "response 3 of 8" in shown
    assert "TD error" in shown
    assert "= reward" in shown
    page = Path(shown.split("page: ")[1].strip()).read_text()
    assert page.count("<section>") == len(rows)
    assert "advantage, mean over tokens" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ppo", "1"], "recorded are 0, 2"),
        (["nothing", "0"], "no step of this run was recorded"),
        (["ppo"], "name a run and a step"),
        (["ppo", "2", "--response", "99"], "0 to 7 are recorded"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(place: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    if not (place / "ppo").exists():
        run(place, "ppo")
    assert main(["explain", str(place / words[0]), *words[1:]]) == 2
    assert message in capsys.readouterr().err
