"""Sampling beside the update: one update old, corrected for it, and the same run every time."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab.config import load_recipe
from trimtab.errors import ConfigError, RewardError
from trimtab.stages.overlap import Overlap, second
from trimtab.stages.policy import PolicyLearning, policy, policy_config

REWARD = "def letters(prompt, response, row):\n    return float(sum(c in 'aeiou' for c in response))\n"
TRUNCATE = "algorithm.mismatch.kind=truncate"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {w}"}) + "\n" for w in ("one", "two", "three", "four")))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def recipe(place: Path, *overrides: str, algorithm: str = "grpo") -> Any:
    settings = [
        f"model.path={place / 'model'}", f"data.path={place / 'prompts.jsonl'}", f"reward.function={place / 'reward.py'}:letters",
        f"output={place / 'run'}", "model.dtype=float32", "sampling.max_tokens=8", "steps=4", "prompts_per_step=4",
        "responses_per_prompt=2", "optim.lr=1e-2", "optim.schedule=constant", "samples_every=2",
    ]  # fmt: skip
    return load_recipe(policy_config(algorithm), None, [*settings, *overrides])


def run(place: Path, *overrides: str, algorithm: str = "grpo") -> tuple[list[dict[str, float]], list[dict[str, Any]]]:
    tracker = tiny.Recorder()
    policy(algorithm, recipe(place, *overrides, algorithm=algorithm), place / "run", tracker)
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in tracker.metrics], tracker.rows


@pytest.mark.parametrize("arrangement", [(), ("model.lora={rank: 2}",), ("model.dtype=bfloat16", "algorithm.epochs=2")])
def test_the_same_seed_gives_the_same_run_bit_for_bit(place: Path, arrangement: tuple[str, ...]) -> None:
    runs = []
    for _ in range(3):
        torch.manual_seed(0)  # peft draws the adapter's start
        runs.append(run(place, "overlap=true", TRUNCATE, *arrangement))
    assert runs[0] == runs[1] == runs[2]
    assert [row["rollout/staleness"] for row in runs[0][0]] == [0, 1, 1, 1]


def test_each_rollout_is_drawn_by_the_policy_before_the_last_update(place: Path) -> None:
    """Held against rollouts drawn afterwards, one after the other, by the weights as they were."""
    learner = PolicyLearning("grpo", recipe(place, "overlap=true", TRUNCATE))
    before: list[dict[str, torch.Tensor]] = []
    seen = []
    for step in range(4):
        before.append({name: p.detach().clone() for name, p in learner.actor.policy.trainable().items()})
        seen.append(learner.step(step)[0].batch.groups)
    learner.close()
    check = PolicyLearning("grpo", recipe(place, TRUNCATE))
    for step, groups in enumerate(seen):
        version = max(0, step - 1)
        check.engine.load(before[version].items(), version)
        again = check.rollout(step, type(learner.overlap.make(0)[1])())[0]
        assert tuple(again) == groups
        assert {r.version for g in groups for r in g.responses} == {version}


def test_without_overlap_nothing_is_measured_or_changed(place: Path) -> None:
    plain, _ = run(place, TRUNCATE)
    overlapped, _ = run(place, "overlap=true", TRUNCATE)
    assert "rollout/staleness" not in plain[0]
    same = [key for key in plain[0] if "/lr" not in key]
    assert [plain[0][key] for key in same] == [overlapped[0][key] for key in same]  # the first step is on policy
    assert plain[2] != overlapped[2]


def test_what_is_one_update_old_is_weighed_by_pi_old_over_pi_sampler(place: Path) -> None:
    learner = PolicyLearning("grpo", recipe(place, "overlap=true", TRUNCATE, "algorithm.mismatch.high=1.5"))
    learner.step(0)
    rollout, metrics = learner.step(1)
    learner.close()
    batch = rollout.batch
    weights = (batch.tokens["logprobs_old"] - batch.tokens["logprobs_sampler"]).exp()
    assert float((weights - 1).abs().max()) > 1e-3  # the policy has moved since
    assert metrics["policy/mismatch_weight"] == pytest.approx(float(weights.clamp(max=1.5)[batch.mask].mean()), rel=1e-4)
    assert metrics["policy/first_ratio_max"] == 1.0


def test_sampling_and_scoring_go_on_while_the_trainer_learns(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of a step waits here until the next rollout has been scored: without overlap it would wait for ever."""
    learner = PolicyLearning("grpo", recipe(place, "overlap=true", TRUNCATE, "steps=3"))
    scored, score, learn, threads = threading.Event(), learner.reward.score, learner.learn, set()

    def scoring(groups: Any) -> Any:
        threads.add(threading.current_thread().name.rstrip("0123456789_"))
        scored.set()
        return score(groups)

    def learning(batch: Any, step: int, guards: Any) -> Any:
        assert step == 2 or scored.wait(20)
        scored.clear()
        return learn(batch, step)

    monkeypatch.setattr(learner.reward, "score", scoring)
    monkeypatch.setattr(learner, "learn", learning)
    metrics = [learner.step(step)[1] for step in range(3)]
    learner.close()
    assert threads == {"MainThread", "rollout"}
    assert {"time/wait", "time/beside/generate", "time/beside/reward"} <= metrics[1].keys()
    assert "time/generate" not in metrics[1]


def test_an_adapters_copy_shares_the_frozen_weights(place: Path) -> None:
    learner = PolicyLearning("grpo", recipe(place, "overlap=true", TRUNCATE, "model.lora={rank: 2}"))
    mine = dict(learner.engine.model.model.named_parameters())
    for name, parameter in learner.actor.policy.model.named_parameters():
        assert (mine[name] is parameter) != ("lora_" in name)
    learner.close()
    assert second(learner.actor.policy).trainable() == {}


def test_a_failing_reward_stops_the_run_with_its_own_error(place: Path) -> None:
    (place / "bad.py").write_text(
        "calls = []\ndef f(prompt, response, row):\n    calls.append(1)\n    return 1.0 if len(calls) < 9 else None\n"
    )
    with pytest.raises(RewardError, match="not a number"):
        run(place, "overlap=true", TRUNCATE, f"reward.function={place / 'bad.py'}:f")


def test_an_overlap_takes_only_the_step_it_began(place: Path) -> None:
    made: list[tuple[int, int]] = []
    weights = [-1]
    overlap = Overlap(lambda step: made.append((step, weights[0])) or step, lambda step: weights.__setitem__(0, step))
    assert [overlap.take(step, more=True) for step in (0, 1, 5)] == [0, 1, 5]
    overlap.wait()
    overlap.close()
    assert made == [(0, 0), (1, 0), (2, 1), (5, 5), (6, 5)]


@pytest.mark.parametrize(("overrides", "fix"), [((), "mismatch.kind=truncate"), ((TRUNCATE, "roles=textbook"), "roles=standard")])
def test_settings_that_do_not_go_with_overlap_name_the_fix(place: Path, overrides: tuple[str, ...], fix: str) -> None:
    with pytest.raises(ConfigError, match=fix):
        recipe(place, "overlap=true", *overrides)
