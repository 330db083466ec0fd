"""The policy stage: invariants of PPO that hold in every run, on tiny real models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import tiny
from trimtab.config import load_recipe
from trimtab.errors import ConfigError, RewardError
from trimtab.models.scorer import Scorer
from trimtab.stages.policy import PolicyLearning, policy, policy_config
from trimtab.training.clock import Clock
from trimtab.training.update import Ahead
from trimtab.types import Score

REWARD = "def letters(prompt, response, row):\n    return float(sum(c in 'aeiou' for c in response))\n"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model")
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"say {w}"}) + "\n" for w in ("one", "two", "three", "four")))
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def recipe(place: Path, *overrides: str, algorithm: str = "ppo") -> Any:
    settings = [
        f"model.path={place / 'model'}", f"data.path={place / 'prompts.jsonl'}", f"reward.function={place / 'reward.py'}:letters",
        f"output={place / 'run'}", "model.dtype=float32", "sampling.max_tokens=8", "steps=2", "prompts_per_step=4",
        "responses_per_prompt=2", "optim.lr=1e-3", "samples_every=1",
    ]  # fmt: skip
    return load_recipe(policy_config(algorithm), None, [*settings, *overrides])


def run(place: Path, *overrides: str) -> tiny.Recorder:
    tracker = tiny.Recorder()
    policy("ppo", recipe(place, *overrides), place / "run", tracker)
    return tracker


@pytest.mark.parametrize("arrangement", [(), ("critic.trunk=own",), ("model.lora={rank: 4}",), ("model.dtype=bfloat16",)])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_first_update_has_ratio_one_and_kl_zero_exactly(place: Path, arrangement: tuple[str, ...], minibatches: int) -> None:
    tracker = run(place, "algorithm.epochs=2", f"algorithm.minibatches={minibatches}", "micro_batch_tokens=40", *arrangement)
    for row in tracker.metrics:
        assert row["policy/first_ratio_max"] == 1.0
        assert row["policy/first_approx_kl"] == 0.0
        assert row["policy/approx_kl"] > 0  # and it moves afterwards
    assert tracker.metrics[0]["kl/mean"] == pytest.approx(0, abs=1e-6)
    assert tracker.metrics[1]["kl/mean"] != 0


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (3, 2), (2, 4)])
def test_epochs_times_minibatches_steps_are_taken(place: Path, epochs: int, minibatches: int) -> None:
    learner = PolicyLearning("ppo", recipe(place, f"algorithm.epochs={epochs}", f"algorithm.minibatches={minibatches}"))
    taken = []
    learner.actor.optimiser.adam.register_step_post_hook(lambda *_: taken.append(1))
    _, metrics = learner.step(0)
    assert len(taken) == metrics["progress/updates"] == epochs * minibatches


def test_same_seed_same_run_other_seed_another(place: Path) -> None:
    def timeless(*overrides: str) -> list[dict[str, float]]:
        return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in run(place, *overrides).metrics]

    first, again, other = timeless(), timeless(), timeless("seed=1")
    assert first == again
    assert first != other


@pytest.mark.parametrize(
    "arrangement",
    [
        ("algorithm.epochs=2", "algorithm.minibatches=2"),
        ("micro_batch_tokens=40",),
        ("critic.trunk=own", "model.lora={rank: 4}"),
        ("model.dtype=bfloat16", "algorithm.entropy_weight=0.01", "reference.role=ema"),
        ("algorithm.kl.place=loss", "algorithm.kl.estimator=full"),
        ("critic.warmup_steps=1",),
    ],
)
def test_learning_from_the_look_itself_changes_nothing_bit_for_bit(
    place: Path, arrangement: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def learnt() -> tuple[list[dict[str, float]], list[torch.Tensor]]:
        learner = PolicyLearning("ppo", recipe(place, "optim.lr=1e-2", *arrangement))
        rows = [learner.step(step)[1] for step in range(3)]
        timeless = [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]
        return timeless, [p.detach().clone() for p in learner.actor.policy.trainable().values()]

    served = []
    serves = Ahead.serves
    monkeypatch.setattr(Ahead, "serves", staticmethod(lambda kept, batch: served.append(serves(kept, batch)) or served[-1]))
    torch.manual_seed(0)  # peft draws the adapter's start
    metrics, weights = learnt()
    assert all(served)
    assert len(served) == (3 - ("critic.warmup_steps=1" in arrangement)) * (1 + ("critic.trunk=own" in arrangement))
    monkeypatch.setattr(Ahead, "serves", staticmethod(lambda *_: False))
    torch.manual_seed(0)
    again, same = learnt()
    assert metrics == again
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def test_without_a_penalty_the_reference_is_asked_for_recorded_samples_only(place: Path) -> None:
    tracker = tiny.Recorder()
    policy("grpo", recipe(place, "algorithm.kl.beta=0", "steps=5", "samples_every=3", algorithm="grpo"), place / "run", tracker)
    assert [row["step"] for row in tracker.metrics if "kl/mean" in row] == [0, 3, 4] == sorted({row["step"] for row in tracker.rows})
    policy("grpo", recipe(place, "algorithm.kl.beta=0.1", "steps=2", "samples_every=3", algorithm="grpo"), place / "run", tracker)
    assert all("kl/mean" in row for row in tracker.metrics[5:])


@pytest.mark.parametrize(("setting", "looks"), [("algorithm.kl.beta=0", 1), ("algorithm.kl.place=loss", 1), ("algorithm.kl.beta=0.1", 2)])
def test_a_greedy_baseline_asks_no_model_for_a_return_that_is_reward_alone(place: Path, setting: str, looks: int) -> None:
    learner = PolicyLearning("remax", recipe(place, setting, "shaping.missing_eos_penalty=2", algorithm="remax"))
    groups = learner.engine.generate(learner.prompts, 2, seed=0)
    seen: list[int] = []
    look = learner.look
    learner.look = lambda *args, **options: (seen.append(1), look(*args, **options))[1]  # type: ignore[method-assign]
    batch = learner.look(groups, learner.reward.score(groups))
    baseline, _ = learner.greedy_returns(groups, batch)
    assert len(seen) == looks
    greedy = learner.greedy_engine.generate([group.prompt for group in groups], 1, seed=0)
    looked = look(greedy, learner.reward.score(greedy))
    assert torch.equal(baseline, looked.sum_by_response(learner.algorithm.rewards(looked))[batch.group_of_response])


def test_target_kl_stops_the_inner_epochs(place: Path) -> None:
    free = run(place, "algorithm.epochs=6", "optim.lr=3e-2").metrics[0]
    held = run(place, "algorithm.epochs=6", "optim.lr=3e-2", "algorithm.target_kl=0.01").metrics[0]
    assert free["progress/updates"] == 6
    assert held["progress/updates"] < 6


def test_critic_warm_up_leaves_the_policy_alone(place: Path) -> None:
    for trunk in ("shared", "own"):
        learner = PolicyLearning("ppo", recipe(place, f"critic.trunk={trunk}", "critic.warmup_steps=1", "critic.optim.lr=1e-2"))
        before = {name: p.clone() for name, p in learner.actor.policy.trainable().items()}
        losses = [learner.step(0)[1]["critic/loss"] for _ in range(3)]
        assert all(torch.equal(before[name], p) for name, p in learner.actor.policy.trainable().items())
        assert losses[-1] < losses[0]
        learner.step(1)
        assert any(not torch.equal(before[name], p) for name, p in learner.actor.policy.trainable().items())


def test_critic_takes_its_own_number_of_updates(place: Path) -> None:
    learner = PolicyLearning("ppo", recipe(place, "critic.trunk=own", "critic.updates=3", "algorithm.epochs=2"))
    taken: list[str] = []
    learner.actor.optimiser.adam.register_step_post_hook(lambda *_: taken.append("policy"))
    learner.actor.critic_optimiser.adam.register_step_post_hook(lambda *_: taken.append("critic"))
    learner.step(0)
    assert taken == ["policy", "critic", "critic", "critic"] * 2


def test_missing_eos_is_penalised_and_rewards_normalised(place: Path) -> None:
    learner = PolicyLearning("ppo", recipe(place, "shaping.missing_eos_penalty=5", "shaping.normalise=true", "shaping.clip=2"))
    groups = learner.engine.generate(learner.prompts, 2, seed=0)
    batch = learner.look(groups, learner.reward.score(groups))
    raw, shaped = batch.responses["score"], batch.responses["reward"]
    white = ((raw - raw.mean()) / raw.std(correction=0)).clamp(-2, 2)
    assert torch.allclose(shaped, white - 5 * batch.truncated, atol=1e-5)
    assert batch.truncated.any()


def test_the_score_sits_on_the_last_token_and_kl_on_every_token(place: Path) -> None:
    learner = PolicyLearning("ppo", recipe(place, "algorithm.kl.beta=0.3"))
    learner.step(0)  # so that policy and reference differ
    groups = learner.engine.generate(learner.prompts, 2, seed=5)
    batch = learner.algorithm.credit(learner.look(groups, learner.reward.score(groups)))
    expected = -0.3 * (batch.tokens["logprobs_old"] - batch.tokens["logprobs_ref"]).double()
    expected[batch.last_token] += batch.responses["reward"]
    assert torch.allclose(batch.tokens["token_rewards"].double(), expected, atol=1e-5)
    assert float(batch.tokens["advantages"].mean()) == pytest.approx(0, abs=1e-5)
    assert float(batch.tokens["advantages"].std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_adaptive_beta_moves(place: Path) -> None:
    betas = [row["kl/beta"] for row in run(place, "algorithm.kl.target=50", "algorithm.kl.horizon=10").metrics]
    assert betas[0] < 0.05
    assert betas[1] < betas[0]


@pytest.mark.parametrize("lora", [False, True])
def test_policy_and_critic_load_in_plain_transformers(place: Path, lora: bool) -> None:
    overrides = ["critic.trunk=own"] + (["model.lora={rank: 4}"] if lora else [])
    config = recipe(place, *overrides)
    tracker = tiny.Recorder()
    policy("ppo", config, place / "run", tracker)
    saved = place / "run" / "checkpoints" / "last"
    ids = torch.tensor([[7, 8, 9, 10]])
    if lora:
        from peft import PeftModel

        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "model"), saved / "model")
        assert not torch.equal(plain(ids).logits, AutoModelForCausalLM.from_pretrained(place / "model")(ids).logits)
        assert (saved / "model" / "adapter_config.json").exists()
    else:
        plain = AutoModelForCausalLM.from_pretrained(saved / "model")
        assert torch.isfinite(plain(ids).logits).all()
        critic = AutoModelForSequenceClassification.from_pretrained(saved / "critic")
        assert critic.num_labels == 1


def test_shared_value_head_is_saved(place: Path) -> None:
    from safetensors.torch import load_file

    run(place)
    head = load_file(place / "run" / "checkpoints" / "last" / "model" / "value_head.safetensors")
    assert head["weight"].abs().sum() > 0


def test_reward_model_with_another_tokenizer_and_critic_from_it(place: Path) -> None:
    tiny.folder(place / "other", "gpt2", chat=True)
    scorer = Scorer.load(recipe(place).model.model_copy(update={"path": str(place / "other")}), head="normal")
    scorer.save(place / "rm")
    tracker = run(
        place, "reward.function=null", f"reward.model={place / 'rm'}", "critic.trunk=own", "critic.init=reward", "data.template=plain"
    )
    assert {"rm"} == set(tracker.rows[0]["parts"])
    assert tracker.metrics[0]["critic/explained_variance"] != 0  # the critic starts as the reward model, not at zero


def test_combined_rewards_report_their_parts(place: Path) -> None:
    members = (
        f"[{{function: {place / 'reward.py'}:letters, name: vowels}}, {{function: {place / 'reward.py'}:letters, name: again, weight: 2}}]"
    )
    tracker = run(place, "reward.function=null", f"reward.members={members}")
    row = tracker.rows[0]
    assert row["reward"] == pytest.approx(row["parts"]["vowels"] + 2 * row["parts"]["again"])
    assert "reward/vowels" in tracker.metrics[0]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def f(p, r, row):\n    raise KeyError('x')", "raised KeyError"),
        ("def f(p, r, row):\n    return float('nan')", "returned nan"),
        ("def f(p, r, row):\n    return 'good'", "not a number"),
        ("def f(p, r, row):\n    return None", "not a number"),
    ],
)
def test_a_bad_reward_function_is_named(place: Path, body: str, message: str) -> None:
    (place / "bad.py").write_text(body)
    with pytest.raises(RewardError, match=message):
        run(place, f"reward.function={place / 'bad.py'}:f")


def test_calls_at_the_same_time_give_the_same_scores_in_order(place: Path) -> None:
    """Four calls wait here for each other: one after the other they would wait for ever."""
    (place / "slow.py").write_text(
        "import threading\nmeet = threading.Barrier(4)\n"
        "def f(prompt, response, row):\n    meet.wait(20)\n    return float(len(prompt) + len(response))\n"
    )
    learner = PolicyLearning("ppo", recipe(place, f"reward.function={place / 'slow.py'}:f", "reward.workers=4"))
    groups = learner.engine.generate(learner.prompts, 2, seed=0)
    totals = [[score.total for score in row] for row in learner.reward.score(groups)]
    assert totals == [[float(len(g.prompt.as_text) + len(r.text)) for r in g.responses] for g in groups]


def test_batched_reward_with_the_wrong_count_is_named(place: Path) -> None:
    (place / "bad.py").write_text("def f(prompts, responses, rows):\n    return [1.0]")
    with pytest.raises(RewardError, match="1 scores for 8 responses"):
        run(place, f"reward.function={place / 'bad.py'}:f", "reward.batched=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sampling.temperature=0", "temperature must be above 0"),
        ("sampling.top_p=0.9", "top_p and top_k must be off"),
        ("algorithm.kl.beta=-1", "algorithm.kl.beta"),
        ("responses_per_prompt=0", "responses_per_prompt"),
        ("algorithm.epoch=3", "did you mean 'algorithm.epochs'"),
        ("critic.init=reward", "no single reward model"),
        ("reward.function=null", "no reward is set"),
    ],
)
def test_bad_settings_are_named(place: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(place, "critic.trunk=own", override)


def test_the_order_is_sample_score_credit_update(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, order = PolicyLearning("ppo", recipe(place)), []
    for owner, name in ((learner.engine, "generate"), (learner.reward, "score"), (learner.algorithm, "credit"), (learner, "learn")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _f=original, _n=name, **k: (order.append(_n), _f(*a, **k))[1])
    learner.step(0)
    assert order == ["generate", "score", "credit", "learn"]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("role", "settings"), [("frozen", ()), ("synced", ("reference.every=1",)), ("ema", ("reference.decay=0.5",))])
def test_reference_roles(place: Path, role: str, settings: tuple[str, ...], lora: bool) -> None:
    adapter = ["model.lora={rank: 4}"] if lora else []
    rows = run(place, f"reference.role={role}", "steps=3", "optim.schedule=constant", *settings, *adapter).metrics
    kl = [abs(row["kl/mean"]) for row in rows]
    assert kl[0] < 1e-6  # every reference begins where the policy does
    if role == "synced":  # it is the policy of the step before, after its update
        assert max(kl) < 1e-6
    else:
        assert min(kl[1:]) > 1e-6


def test_a_moving_average_stays_between_start_and_policy(place: Path) -> None:
    def kl(role: str) -> float:
        return run(place, f"reference.role={role}", "reference.decay=0.8", "steps=4", "optim.lr=3e-3").metrics[-1]["kl/mean"]

    assert 0 < kl("ema") < kl("frozen")


def test_without_a_reference_there_is_no_kl_to_measure_or_to_penalise(place: Path) -> None:
    rows = run(place, "reference.role=none", "algorithm.kl.beta=0").metrics
    assert not any(name.startswith("kl/mean") for name in rows[0])
    with pytest.raises(ConfigError, match=r"algorithm\.kl\.beta=0"):
        recipe(place, "reference.role=none")


def test_textbook_roles_are_one_frozen_policy(place: Path) -> None:
    rows = run(place, "roles=textbook", "steps=3", "optim.lr=3e-3").metrics
    assert all(row["kl/mean"] == 0 for row in rows)  # sampler, denominator and anchor are the same
    assert rows[0]["policy/first_ratio_max"] == 1.0
    assert rows[2]["policy/first_ratio_max"] > 1.001  # the policy has moved away from what samples
    learner = PolicyLearning("ppo", recipe(place, "roles=textbook", "optim.lr=1e-2"))
    before = [r.tokens for g in learner.sample(5, Clock())[0] for r in g.responses]
    learner.step(0)
    assert [r.tokens for g in learner.sample(5, Clock())[0] for r in g.responses] == before


def test_groups_that_all_score_alike_make_room_for_further_prompts(place: Path) -> None:
    (place / "reward.py").write_text("def letters(prompt, response, row):\n    return float('one' in prompt and 'a' < response)\n")
    learner = PolicyLearning("dapo", recipe(place, "prompts_per_step=2", "algorithm.resample=4", algorithm="dapo"))
    groups, scores, dropped, _ = learner.sample(0, Clock())
    useful = [len({score.total for score in row}) > 1 for row in scores]
    assert len(groups) == 2
    assert dropped > 0
    assert useful == sorted(useful, reverse=True)  # what teaches something comes first; the rest fills up
    assert any(useful)


def test_greedy_returns_are_the_baseline_of_remax(place: Path) -> None:
    learner = PolicyLearning("remax", recipe(place, "sampling.max_tokens=6", algorithm="remax"))
    groups, scores, *_ = learner.sample(0, Clock())
    batch = learner.look(groups, scores)
    baseline, _ = learner.greedy_returns(groups, batch)
    greedy = learner.greedy_engine.generate([g.prompt for g in groups], 1, seed=0)
    expected = [row[0].total for row in learner.reward.score(greedy)]  # policy = reference: there is no penalty yet
    assert baseline.tolist() == pytest.approx([x for x in expected for _ in range(2)], abs=1e-4)


def test_rewards_that_are_placed_stay_where_they_were_put(place: Path) -> None:
    class Placed:
        name = "placed"

        def score(self, groups: Any) -> Any:
            return [[Score(3.0, {}, ((0, 2.0), (0, -1.0), (len(r.tokens) - 1, 2.0))) for r in g.responses] for g in groups]

    learner = PolicyLearning("ppo", recipe(place, "algorithm.kl.beta=0", "shaping.missing_eos_penalty=5"))
    learner.reward = Placed()
    groups, scores, *_ = learner.sample(0, Clock())
    batch = learner.algorithm.credit(learner.look(groups, scores))
    rewards, first = batch.tokens["token_rewards"].split(batch.lengths), batch.truncated.tolist()
    for row, cut in zip(rewards, first, strict=True):
        assert float(row.sum()) == pytest.approx(3 - 5 * cut)
        assert len(row) == 1 or float(row[0]) == pytest.approx(1.0)
