"""Our side: the product's own pieces, with their default settings, one step at a time.

sft, reward   training.update with the stage's loss, Optimiser, LanguageModel or Scorer
dpo           PreferenceLearning: its prepared batch, its loss, the same update. It looks at the reference once, before training;
              a run that passes over its data once pays one such look for every update, so where the work has a reference pass
              (`reference`), each step is charged one
grpo, ...     PolicyLearning.step: sample, score, look, assign credit, update
decode        LocalEngine.generate
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from typing import Any

from bench.data import Row, as_text, in_steps, packed_tokens, plain_tokens, read_rows
from bench.link import Meter, Reply, resident, serve
from bench.works import Work

LEARNING_RATE = 1e-6

Step = Callable[[int], dict[str, float]]
"""Does the work of step i; returns its metrics."""


def groups_of(rows: list[Row]) -> list[Any]:
    from trimtab.types import Group, Prompt, Response

    def response(tokens: list[int]) -> Response:
        return Response(tuple(tokens), "")

    return [Group(Prompt(tuple(row["prompt"]), as_text(row["prompt"])), tuple(map(response, row["responses"]))) for row in rows]


def supervised(work: Work, steps: list[list[Row]], model: str, budget: int, *, checkpointing: bool = False) -> Step:
    """Fine-tuning, or a reward model on pairs."""
    from trimtab.algorithms.reward import RewardLossConfig, reward_loss
    from trimtab.batch import Batch
    from trimtab.models.language import LanguageModel
    from trimtab.models.loading import ModelConfig
    from trimtab.models.scorer import Scorer
    from trimtab.stages.common import nll_loss
    from trimtab.stages.reward import reward_batch
    from trimtab.training.optimiser import OptimConfig, Optimiser
    from trimtab.training.update import update
    from trimtab.types import Comparison

    optim = OptimConfig(lr=LEARNING_RATE, schedule="constant")
    if work.kind == "sft":
        policy = LanguageModel.load(ModelConfig(path=model, checkpointing=checkpointing))
        optimisers = [Optimiser(policy.trainable(), optim, len(steps))]
        batches = [Batch(tuple(groups_of(rows))) for rows in steps]
        return lambda i: update(batches[i], policy.forward, nll_loss("token"), optimisers, at=i, token_budget=budget)
    scorer = Scorer.load(ModelConfig(path=model), head="saved")
    parameters = scorer.trainable()
    head = {name: parameters.pop(name) for name in list(parameters) if "score." in name}
    optimisers = [Optimiser(own, optim, len(steps)) for own in (parameters, head)]
    loss = reward_loss(RewardLossConfig(kind="bradley-terry"))
    batches = [reward_batch([Comparison(g, (1.0, 0.0)) for g in groups_of(rows)], "bradley-terry") for rows in steps]
    return lambda i: update(batches[i], scorer.scores, loss, optimisers, at=i, token_budget=budget)


def preference(work: Work, steps: list[list[Row]], model: str, budget: int) -> Step:
    """DPO."""
    from trimtab.batch import observe
    from trimtab.data.records import DataConfig
    from trimtab.models.language import LanguageModel
    from trimtab.models.loading import ModelConfig
    from trimtab.stages.preference import PreferenceLearning, preference_config
    from trimtab.training.fit import FitConfig
    from trimtab.training.optimiser import OptimConfig, Optimiser
    from trimtab.training.update import update
    from trimtab.types import Comparison

    config = preference_config("dpo")(
        output="unused",
        model=ModelConfig(path=model),
        data=DataConfig(path="rows"),
        fit=FitConfig(batch_size=work.rows, micro_batch_tokens=budget),
        optim=OptimConfig(lr=LEARNING_RATE, schedule="constant"),
    )
    policy = LanguageModel.load(config.model)
    records = [Comparison(group, (1.0, 0.0)) for rows in steps for group in groups_of(rows)]
    learner = PreferenceLearning("dpo", config, policy, records, [], Silent())
    optimiser = Optimiser(policy.trainable(), config.optim, len(steps))

    def step(i: int) -> dict[str, float]:
        batch = learner.prepare(learner.data.batch.select(range(i * work.rows, (i + 1) * work.rows)), i)
        if work.reference:
            observe(batch, policy.forward, token_budget=budget)
        return update(batch, policy.forward, learner.algorithm.loss, [optimiser], at=i, token_budget=budget)

    return step


def rollout(work: Work, steps: list[list[Row]], model: str, scorer: str, budget: int) -> Step:
    """GRPO, RLOO, PPO with settings that mean the same as the peer's."""
    from trimtab.data.cursor import Cursor
    from trimtab.stages.policy import PolicyLearning, policy_config

    settings: dict[str, Any] = {
        "model": {"path": model},
        "sampling": {"max_tokens": work.new, "temperature": 1.0},
        "prompts_per_step": work.rows,
        "responses_per_prompt": work.responses,
        "steps": len(steps),
        "micro_batch_tokens": budget,
        "optim": {"lr": LEARNING_RATE, "schedule": "constant"},
        "reward": {"function": "bench.rewards:sevens"},
    }
    if work.kind == "grpo":  # as the peer's default: no reference, every token weighs the same
        settings |= {"algorithm": {"kl": {"beta": 0.0}, "aggregation": "token"}, "reference": {"role": "none"}}
    if work.kind == "ppo":
        settings |= {"algorithm": {"epochs": 1}, "reward": {"model": scorer}, "critic": {"trunk": "own", "init": "reward"}}
    config = policy_config(work.kind)
    order = [i for step in range(len(steps)) for i in Cursor(len(steps) * work.rows, work.rows, 0).at(step)]
    rows = [row for step in steps for row in step]
    placed = {place: as_text(row["prompt"]) for place, row in zip(order, rows, strict=True)}  # step k meets the rows of step k
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        file.writelines(json.dumps({"prompt": placed[i]}) + "\n" for i in range(len(placed)))
        file.flush()
        learner = PolicyLearning(work.kind, config.model_validate({**settings, "data": {"path": file.name}}))
    return lambda i: learner.step(i)[1]


def decode(work: Work, steps: list[list[Row]], model: str) -> Step:
    """Sampling alone, the prompts read included."""
    from trimtab.engines.local import LocalEngine
    from trimtab.engines.sampling import SamplingConfig
    from trimtab.models.language import LanguageModel
    from trimtab.models.loading import ModelConfig

    engine = LocalEngine(LanguageModel.load(ModelConfig(path=model), trainable=False), SamplingConfig(max_tokens=work.new))

    def step(i: int) -> dict[str, float]:
        groups = engine.generate([group.prompt for group in groups_of(steps[i])], work.responses, seed=i)
        return {"response/tokens": float(sum(len(r.tokens) for group in groups for r in group.responses))}

    return step


class Silent:
    """A tracker that keeps nothing."""

    def log(self, step: int, metrics: Any) -> None: ...

    def samples(self, step: int, rows: Any) -> None: ...

    def event(self, kind: str, **details: Any) -> None: ...

    def close(self) -> None: ...


class Side:
    """What the parent asks for: prepare once, then steps one by one."""

    def __init__(self) -> None:
        self.meter = Meter()

    def prepare(self, work: dict[str, Any], rows: str, model: str, setting: dict[str, Any], scorer: str = "") -> Reply:
        """setting: {budget: packed tokens per micro-batch (null: the stage's default), checkpointing: bool (sft), without: [ablations]}."""
        import trimtab.stages.policy
        import trimtab.stages.preference  # noqa: F401

        bare = resident()
        self.work = Work(**work)
        if setting.get("without"):
            from bench.ablate import switch_off

            switch_off(setting["without"])
        from trimtab.training.fit import FitConfig

        budget = setting.get("budget") or FitConfig().micro_batch_tokens
        self.rows = in_steps(read_rows(rows), self.work.rows)
        steps = self.rows
        if self.work.kind == "dpo":
            self.step_of = preference(self.work, steps, model, budget)
        elif self.work.kind == "decode":
            self.step_of = decode(self.work, steps, model)
        elif self.work.generates:
            self.step_of = rollout(self.work, steps, model, scorer, budget)
        else:
            self.step_of = supervised(self.work, steps, model, budget, checkpointing=setting.get("checkpointing", False))
        self.done = 0
        return {"bare_bytes": bare, "loaded_bytes": resident()}

    def step(self) -> Reply:
        rows, i = self.rows[self.done], self.done
        self.done += 1
        self.meter.start()
        metrics = self.step_of(i)
        measured = self.meter.stop()
        return {**measured, "metrics": metrics, "packed_tokens": packed_tokens(rows), "plain_tokens": plain_tokens(rows)}


if __name__ == "__main__":
    side = Side()
    serve({"prepare": side.prepare, "step": side.step})
