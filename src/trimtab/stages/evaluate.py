"""Whether it worked: held-out reward, KL to the reference, and win rate against another model, with paired intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator

from trimtab import rewards, seeds
from trimtab.batch import Batch, Outputs, observe
from trimtab.data.records import DataConfig, load_prompts
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.maths.best_of_n import kl_estimate
from trimtab.maths.statistics import distinct_n, mean_interval, paired_bootstrap, win_rate
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.protocols import Reward, Tracker
from trimtab.rewards import RewardConfig
from trimtab.stages.common import StageConfig, sample_row
from trimtab.stages.sample import best_of
from trimtab.types import Group, Prompt

TOKEN_BUDGET = 4096


class EvaluateConfig(StageConfig):
    """A recipe of `trimtab evaluate`."""

    output: str = Field("runs/evaluate", description="the run directory to write")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the model to evaluate")
    against: ModelConfig = Field(default_factory=ModelConfig, description="the model to compare with; KL is measured to it")
    data: DataConfig = Field(description="held-out prompts")
    reward: RewardConfig = Field(description="what judges the responses")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    best_of: int = Field(1, gt=0, description="take the best of this many responses by the reward (1: just one response)")

    @model_validator(mode="after")
    def _draws_differ(self) -> EvaluateConfig:
        if self.best_of > 1 and self.sampling.temperature == 0:
            raise ValueError("best_of needs sampling.temperature above 0: greedy responses are all the same")
        return self


@dataclass(frozen=True)
class Measured:
    """One model's answers to the held-out prompts, one each, and what is known of them.

    scores: by reward name, one per prompt.  kl: per response, in nats (k1: log pi - log pi_ref of the response; see `measure`
    for best-of-n).
    perplexity: exp of the mean negative log-probability per token under the reference.
    """

    groups: list[Group]
    scores: dict[str, list[float]]
    kl: list[float]
    perplexity: float
    distinct2: float


def measure(
    model: LanguageModel,
    reference: Callable[..., Outputs],
    prompts: Sequence[Prompt],
    judges: Sequence[Reward],
    sampling: SamplingConfig,
    *,
    seed: int,
    rows: int = 64,
    n: int = 1,
    selector: Reward | None = None,
) -> Measured:
    """Answer every prompt once (or with the best of n by `selector`) and measure.

    KL(pi_n || pi_ref) = KL(pi_n || pi) + E_{pi_n}[log pi - log pi_ref]. The second term is measured; the first is the estimate
    of Beirami et al. 2024 (`maths.best_of_n.kl_estimate`), which errs upwards, to log n - (n - 1) / n at most.
    """
    groups = LocalEngine(model, sampling, EngineConfig(rows=rows)).generate(prompts, n, seed=seeds.derive(seed, "evaluate"))
    if n > 1:
        assert selector is not None
        groups = best_of(groups, selector)
    batch, temperature = Batch(tuple(groups)), sampling.temperature or 1.0
    own = observe(batch, lambda b: model.forward(b, temperature=temperature), token_budget=TOKEN_BUDGET).logprobs
    ref = observe(batch, lambda b: reference(b, temperature=temperature), token_budget=TOKEN_BUDGET).logprobs
    assert own is not None
    assert ref is not None
    kl = batch.sum_by_response(own - ref).double()
    if n > 1:
        kl += kl_estimate(batch.sum_by_response(own), n)
    scores = {judge.name: [row[0].total for row in judge.score(groups)] for judge in judges}
    return Measured(groups, scores, kl.tolist(), float(torch.exp(-ref.mean())), distinct_n([g.responses[0].text for g in groups], 2))


def against(measured: Measured, start: Measured, judge: str, seed: int = 0) -> dict[str, float]:
    """Paired comparison by one judge: mean difference and win rate with 95 % bootstrap intervals over prompts."""
    a, b = measured.scores[judge], start.scores[judge]
    delta, wins = paired_bootstrap(a, b, seed=seed), win_rate(a, b, seed=seed)
    return {
        "delta": delta.estimate, "delta_low": delta.low, "delta_high": delta.high,
        "win_rate": wins.estimate, "win_rate_low": wins.low, "win_rate_high": wins.high,
    }  # fmt: skip


def evaluate(config: EvaluateConfig, run: Path, tracker: Tracker) -> dict[str, float]:
    """Measure `model` against `against` on held-out prompts; writes evaluation.json and samples."""
    model = LanguageModel.load(config.model, template=config.data.template, trainable=False)
    start = LanguageModel.load(config.against, template=config.data.template, trainable=False)
    loaded = load_prompts(config.data, model.template)
    loaded.report(tracker)
    prompts = loaded.holdout or loaded.records
    judge = rewards.make(config.reward, device=config.model.device, policy=model.template)
    tracker.event("training", steps=2, prompts=len(prompts))
    common: dict[str, Any] = {"seed": config.seed, "rows": config.engine.rows}
    base = measure(start, start.forward, prompts, [judge], config.sampling, **common)
    ours = measure(model, start.forward, prompts, [judge], config.sampling, n=config.best_of, selector=judge, **common)
    result: dict[str, float] = {"prompts": float(len(prompts))}
    for name, measured in (("against", base), ("model", ours)):
        mean, kl = mean_interval(measured.scores[judge.name]), mean_interval(measured.kl)
        result |= {f"{name}/reward": mean.estimate, f"{name}/reward_low": mean.low, f"{name}/reward_high": mean.high}
        result |= {f"{name}/kl": kl.estimate, f"{name}/kl_low": kl.low, f"{name}/kl_high": kl.high}
        result |= {f"{name}/perplexity_under_reference": measured.perplexity, f"{name}/distinct2": measured.distinct2}
    result |= {f"comparison/{name}": value for name, value in against(ours, base, judge.name, config.seed).items()}
    for step, measured in enumerate((base, ours)):
        tracker.samples(step, sample_rows(measured, judge.name))
    tracker.log(0, result)
    (run / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


def sample_rows(measured: Measured, judge: str) -> list[dict[str, Any]]:
    """Sample rows of one model's answers."""
    table = [{name: values[i] for name, values in measured.scores.items()} for i in range(len(measured.groups))]
    return [
        sample_row(group.prompt, group.responses[0], parts[judge], parts, kl)
        for group, parts, kl in zip(measured.groups, table, measured.kl, strict=True)
    ]
