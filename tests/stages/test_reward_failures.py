"""A run goes on where its reward fails: what failed is left out or has a value, is counted, and shown."""

from __future__ import annotations

import json
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

import resuming
import tiny
from servers import Answer, Server, lengths, serving
from trimtab.algorithms import ALGORITHMS
from trimtab.cli import main
from trimtab.config import load_recipe
from trimtab.errors import RewardError
from trimtab.stages.overlap import Begun, Overlap
from trimtab.stages.policy import PolicyLearning, policy, policy_config
from trimtab.stages.rejection import RejectionConfig, rejection
from trimtab.training.clock import Clock
from trimtab.types import Score

REWARD = """
import zlib

def fails(prompt, response):
    return zlib.crc32((prompt + response).encode()) % 4 == 0

def some(prompt, response, row):
    if fails(prompt, response):
        raise ValueError("not today")
    return float(sum(c in "aeiou" for c in response)) + 0.01 * len(response)

def one_prompt(prompt, response, row):
    return float("nan") if "two" in prompt else float(len(response))

def all(prompt, response, row):
    raise ValueError("never")
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {w}"}) + "\n" for w in ("one", "two", "three", "four")))
    (tmp_path / "failing.py").write_text(REWARD)
    return tmp_path


def settings(place: Path, function: str = "some") -> list[str]:
    return [
        f"model.path={place / 'model'}", f"data.path={place / 'prompts.jsonl'}", f"reward.function={place / 'failing.py'}:{function}",
        f"output={place / 'run'}", "model.dtype=float32", "sampling.max_tokens=6", "reward.on_failure=exclude", "reward.max_failures=0.9",
    ]  # fmt: skip


def recipe(place: Path, *overrides: str, algorithm: str = "ppo", function: str = "some") -> Any:
    common = ["steps=2", "prompts_per_step=4", "responses_per_prompt=3", "optim.lr=1e-3", "samples_every=1"]
    return load_recipe(policy_config(algorithm), None, [*settings(place, function), *common, *overrides])


def run(place: Path, *overrides: str, algorithm: str = "ppo", function: str = "some") -> tiny.Recorder:
    tracker = tiny.Recorder()
    folder = place / f"run{len(list(place.glob('run*')))}"  # each of its own: one that is there would be gone on with
    policy(algorithm, recipe(place, *overrides, algorithm=algorithm, function=function), folder, tracker)
    return tracker


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_learns_from_what_could_be_scored(place: Path, algorithm: str) -> None:
    tracker = run(place, "steps=1", "algorithm.minibatches=2", algorithm=algorithm)
    [row] = tracker.metrics
    asked = row["reward/failures"] / row["reward/failed_fraction"]
    assert row["reward/failures"] >= 1
    assert asked in {12 * rounds + (4 if algorithm == "remax" else 0) for rounds in range(1, 6)}
    assert row["policy/first_ratio_max"] == 1.0
    assert all(value == value and abs(value) < 1e6 for value in row.values())
    shown = [details for kind, details in tracker.events if kind == "reward failed"]
    assert 1 <= len(shown) <= 3
    assert all("not today" in details["reason"] and details["step"] == 0 for details in shown)


@pytest.mark.parametrize(("algorithm", "least"), [("ppo", 1), ("grpo", 2), ("rloo", 2), ("a2c", 1)])
def test_a_group_keeps_enough_to_be_compared_or_is_dropped(place: Path, algorithm: str, least: int) -> None:
    learner = PolicyLearning(algorithm, recipe(place, "responses_per_prompt=2", algorithm=algorithm))
    sizes: list[int] = []
    for step in range(12):
        groups, scores, _, failures = learner.sample(step, Clock())
        assert [len(group.responses) for group in groups] == [len(row) for row in scores]
        assert not any(score.missing for row in scores for score in row)
        assert failures.count == 8
        sizes += [len(group.responses) for group in groups]
    assert set(sizes) == set(range(least, 3))


def test_the_same_failures_give_the_same_run_beside_the_update_too(place: Path) -> None:
    def timeless(*overrides: str) -> Any:
        tracker = run(place, "steps=3", *overrides, algorithm="grpo")
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in tracker.metrics], tracker.rows, tracker.events[2:]

    assert timeless() == timeless("reward.workers=3", "reward.timeout=5")
    beside = ("overlap=true", "algorithm.mismatch.kind=truncate")
    assert timeless(*beside) == timeless(*beside)


def test_a_rollout_that_is_begun_keeps_its_failures_in_a_checkpoint(place: Path) -> None:
    settings = ("overlap=true", "algorithm.mismatch.kind=truncate")
    with closing(PolicyLearning("grpo", recipe(place, *settings, algorithm="grpo"))) as learner:
        learner.step(0)
        begun, other = Begun(learner.overlap), Overlap(learner.overlap.make, learner.overlap.refresh)
        Begun(other).load_state_dict(json.loads(json.dumps(begun.state_dict())))
        (step, (sampled, _)), (again, (restored, _)) = learner.overlap.pending(), other.pending()
        assert step == again == 1
        assert restored == sampled
        assert restored[3].failed


def test_a_value_stands_in_and_every_response_is_learnt_from(place: Path) -> None:
    learner = PolicyLearning("ppo", recipe(place, "reward.on_failure=value", "reward.failure_value=-5"))
    rollout, metrics = learner.step(0)
    totals = [score.total for row in rollout.scores for score in row]
    assert len(totals) == 12
    assert metrics["reward/failures"] == sum(total == -5 for total in totals) > 0


def test_a_greedy_response_without_a_score_is_replaced_by_the_others_mean(place: Path) -> None:
    learner = PolicyLearning("remax", recipe(place, algorithm="remax", function="one_prompt"))
    groups = learner.engine.generate(learner.prompts, 3, seed=0)
    totals = [float(i) for i in range(12)]
    flat = iter(totals)
    batch = learner.look(groups, [[Score(next(flat)) for _ in group.responses] for group in groups])
    baseline, failures = learner.greedy_returns(groups, batch)
    assert [failed.prompt for failed in failures.failed] == ["say two"]
    two = [g.prompt.as_text for g in groups].index("say two")
    mine = totals[3 * two : 3 * two + 3]
    assert baseline[3 * two : 3 * two + 3].tolist() == pytest.approx([(sum(mine) - x) / 2 for x in mine], abs=1e-4)
    greedy = learner.greedy_engine.generate([g.prompt for g in groups], 1, seed=0)
    expected = [float(len(g.responses[0].text)) for g in greedy for _ in range(3)]
    others = [i for i in range(12) if i // 3 != two]
    assert baseline[others].tolist() == pytest.approx([expected[i] for i in others], abs=1e-4)


@pytest.mark.parametrize(("share", "message"), [("0.1", "max_failures=0.1 allows.*not today"), ("0.9", "never"), ("1", "none is left")])
def test_too_many_failures_end_the_run_with_their_reason(place: Path, share: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        run(place, f"reward.max_failures={share}", function="some" if share == "0.1" else "all")


def test_rejection_chooses_among_what_could_be_scored(place: Path) -> None:
    tracker = tiny.Recorder()
    config = load_recipe(RejectionConfig, None, [*settings(place), "rounds=1", "n=3", "optim.lr=1e-3"])
    rejection(config, place / "run", tracker)
    assert [row["reward/failed_fraction"] * 12 for row in tracker.metrics] == [row["reward/failures"] for row in tracker.metrics]
    assert tracker.metrics[0]["reward/failures"] > 0
    assert any(kind == "reward failed" for kind, _ in tracker.events)


@pytest.mark.slow
def test_a_run_waits_for_a_server_that_is_down_for_twenty_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resuming.prepare(tmp_path)
    monkeypatch.chdir(tmp_path)
    back: list[Server] = []

    def outage() -> None:
        server.close()
        time.sleep(20)
        back.append(Server(lengths, server.port))

    def gone_after_three(asked: dict[str, Any]) -> Answer:
        if len(server.asked) == 3:
            threading.Thread(target=outage).start()
        return lengths(asked)

    def command(output: str, port: int) -> list[str]:
        url = [f"reward.url=http://127.0.0.1:{port}", "reward.patience=60"]
        return [word for word in resuming.command("ppo", output) if word != resuming.LETTERS] + url

    with serving() as undisturbed:
        assert main(command("whole", undisturbed.port)) == 0
    server, began = Server(gone_after_three), time.monotonic()
    assert main(command("waited", server.port)) == 0
    assert time.monotonic() - began > 20
    assert len(back) == 1
    assert back[0].asked
    back[0].close()
    assert resuming.outcome(tmp_path / "waited") == resuming.outcome(tmp_path / "whole")
