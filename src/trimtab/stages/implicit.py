"""`trimtab implicit-reward`: the reward a policy is optimal for, read from the policy itself.

    r(x, y) = beta log (pi(y | x) / pi_ref(y | x)) + beta log Z(x),      Z(x) = E_{y ~ pi_ref} [exp(r(x, y) / beta)]

The last term is the same for all responses to a prompt, so margins are known and rewards only up to it. E_ref [pi / pi_ref] is 1 for
every policy, so the policy alone does not tell Z; with an explicit reward, Z is estimated on responses of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from trimtab import rewards, seeds
from trimtab.batch import Batch, observe
from trimtab.config import Config
from trimtab.data.records import DataConfig, load_comparisons, load_samples, write_jsonl
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.maths.optimum import PartitionEstimate, estimate_log_partition, implicit_rewards
from trimtab.maths.statistics import wilson_interval
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.rewards import RewardConfig
from trimtab.stages.common import check_lengths
from trimtab.types import Comparison, Group, Prompt


class ImplicitConfig(Config):
    """A recipe of `trimtab implicit-reward`."""

    model: ModelConfig = Field(description="the policy whose implicit reward is read")
    reference: ModelConfig = Field(default_factory=ModelConfig, description="the policy it was trained from")
    data: DataConfig = Field(description="comparisons; or, with judged=false, prompts with responses, as `trimtab sample` writes them")
    judged: bool = Field(True, description="the responses are judged (pairs, rankings, ratings, labels): report margins and accuracy")
    beta: float = Field(0.1, gt=0, description="the strength of the KL penalty the policy was trained with")
    reward: RewardConfig | None = Field(None, description="an explicit reward to hold beside the implicit one")
    samples: int = Field(0, ge=0, description="responses of the reference per prompt, to estimate log Z(x) under the explicit reward")
    max_tokens: int = Field(64, gt=0, description="their longest length")
    engine: EngineConfig = Field(default_factory=EngineConfig)
    micro_batch_tokens: int = Field(4096, gt=0, description="packed tokens read at once")
    seed: int = Field(0, ge=0, description="decides every random draw")
    output: str | None = Field(None, description="write JSON lines here, one per prompt")

    @model_validator(mode="after")
    def _a_reward_to_sample_for(self) -> ImplicitConfig:
        if self.samples == 1:
            raise ValueError("samples must be 0, or at least 2: one response has no standard error")
        if self.samples and self.reward is None:
            raise ValueError("samples need a reward: without one, the mean of pi / pi_ref is 1 whatever the policy")
        return self


def implicit_reward(config: ImplicitConfig) -> dict[str, float]:
    """Read the implicit rewards of all responses; writes `output`, prints a table, returns the summary."""
    policy, reference = (LanguageModel.load(m, template=config.data.template, trainable=False) for m in (config.model, config.reference))
    comparisons = read(config, policy)
    groups = [c.group for c in comparisons]
    check_lengths(groups, min(policy.context, reference.context), "a prompt with its response")
    batch = Batch(tuple(groups))
    logprobs = [observe(batch, m.forward, token_budget=config.micro_batch_tokens).logprobs for m in (policy, reference)]
    own, ref = (batch.sum_by_response(column.double() * batch.mask) for column in logprobs if column is not None)
    implied = split(implicit_rewards(own, ref, config.beta).tolist(), groups)
    explicit = partitions = None
    if config.reward is not None:
        reward = rewards.make(config.reward, device=config.model.device, policy=policy.template)
        explicit = [[score.total for score in row] for row in reward.score(groups)]
        partitions = log_partitions(config, reference, reward, [g.prompt for g in groups]) if config.samples else None
    rows = [row_of(config, i, c, implied, explicit, partitions) for i, c in enumerate(comparisons)]
    if config.output is not None:
        write_jsonl(Path(config.output), rows)
    summary = summarise(rows)
    print_summary(summary, config)
    return summary


def read(config: ImplicitConfig, policy: LanguageModel) -> list[Comparison]:
    """What is to be read, held-out part included; responses without a judgement are groups whose scores are all alike."""
    if config.judged:
        judged = load_comparisons(config.data, policy.template)
        return [*judged.records, *judged.holdout]
    plain = load_samples(config.data, policy.template)
    return [Comparison(group, (0.0,) * len(group.responses), "rating") for group in (*plain.records, *plain.holdout)]


def log_partitions(config: ImplicitConfig, reference: LanguageModel, reward: Any, prompts: Sequence[Prompt]) -> list[PartitionEstimate]:
    """log Z(x) of every prompt from responses of the reference itself (temperature 1, nothing cut off but by length)."""
    engine = LocalEngine(reference, SamplingConfig(max_tokens=config.max_tokens), config.engine)
    distinct = list({p.tokens: p for p in prompts}.values())
    sampled = engine.generate(distinct, config.samples, seed=seeds.derive(config.seed, "partition"))
    scores = [[score.total for score in row] for row in reward.score(sampled)]
    known = {p.tokens: estimate_log_partition(row, config.beta) for p, row in zip(distinct, scores, strict=True)}
    return [known[p.tokens] for p in prompts]


def row_of(
    config: ImplicitConfig,
    i: int,
    comparison: Comparison,
    implied: list[list[float]],
    explicit: list[list[float]] | None,
    partitions: list[PartitionEstimate] | None,
) -> dict[str, Any]:
    """One line of the output."""
    group, scores = comparison.group, comparison.scores
    row: dict[str, Any] = {
        "prompt": group.prompt.as_text,
        "responses": [r.text for r in group.responses],
        "implicit_rewards": implied[i],
        "log_ratios": [r / config.beta for r in implied[i]],
    }
    if config.judged:
        pairs = [(a, b) for a, b in comparison.pairs()]
        row |= {"scores": list(scores), "margins": [implied[i][a] - implied[i][b] for a, b in pairs]}
    if explicit is not None:
        row["rewards"] = explicit[i]
    if partitions is not None:
        z = partitions[i]
        row |= {"log_z": z.log_z, "log_z_error": z.error, "log_z_effective_samples": z.effective}
        row["implicit_rewards_with_z"] = [r + config.beta * z.log_z for r in implied[i]]
    return row


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Means over responses, pairs and prompts, with the accuracy on pairs and its Wilson 95 % interval."""
    every = [r for row in rows for r in row["implicit_rewards"]]
    summary = {"prompts": float(len(rows)), "responses": float(len(every)), "implicit_reward": sum(every) / len(every)}
    margins = [m for row in rows for m in row.get("margins", ())]
    if margins:
        right = sum(m > 0 for m in margins)
        low, high = wilson_interval(right, len(margins))
        summary |= {"pairs": float(len(margins)), "margin": sum(margins) / len(margins)}
        summary |= {"accuracy": right / len(margins), "accuracy_low": low, "accuracy_high": high}
    if "log_z" in rows[0]:
        summary["log_z"] = sum(row["log_z"] for row in rows) / len(rows)
        summary["log_z_error"] = sum(row["log_z_error"] for row in rows) / len(rows)
        summary["log_z_effective_samples"] = sum(row["log_z_effective_samples"] for row in rows) / len(rows)
    return summary


def print_summary(summary: dict[str, float], config: ImplicitConfig) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"implicit reward, beta {config.beta:g}", show_header=False, title_justify="left")
    for name, value in summary.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    Console().print(table)
    print("rewards are known up to beta log Z(x), the same for all responses to a prompt; margins are exact")
    if config.output is not None:
        print(f"written: {config.output}")


def split(column: Sequence[float], groups: Sequence[Group]) -> list[list[float]]:
    """A response column as one list per group."""
    flat = iter(column)
    return [[next(flat) for _ in group.responses] for group in groups]
