"""What a step of policy learning reports: numbers over real tokens and responses only, and samples to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trimtab.batch import Batch
from trimtab.maths.advantages import explained_variance
from trimtab.rewards.isolation import Failures
from trimtab.stages.common import part_means, sample_row
from trimtab.types import Group, Score


@dataclass(frozen=True)
class Rollout:
    """What a step saw: the batch with all its columns after credit, the scores by group, and what could not be scored."""

    batch: Batch
    scores: Sequence[Sequence[Score]]
    failures: Failures = field(default_factory=Failures)


def describe(batch: Batch, scores: Sequence[Sequence[Score]]) -> dict[str, float]:
    """The metrics of a rollout batch, over real tokens and responses only."""
    raw, flat = batch.responses["score"], [score for row in scores for score in row]
    metrics = {"reward/mean": raw.mean(), "reward/std": raw.std(correction=0)}
    if not torch.equal(raw, batch.responses["reward"]):
        metrics |= {"reward/shaped": batch.responses["reward"].mean()}
    metrics |= part_means(flat)
    if "logprobs_ref" in batch.tokens:
        log_ratio = batch.tokens["logprobs_old"] - batch.tokens["logprobs_ref"]
        metrics |= {"kl/mean": batch.sum_by_response(log_ratio).mean(), "kl/per_token": log_ratio.mean()}
    metrics |= {"policy/entropy": batch.tokens["entropy"].mean(), "advantage/std": batch.tokens["advantages"].std(correction=0)}
    metrics |= {"sampler/mismatch": (batch.tokens["logprobs_old"] - batch.tokens["logprobs_sampler"]).abs().mean()}
    if "values_old" in batch.tokens:
        metrics |= {"critic/explained_variance": explained_variance(batch.tokens["values_old"], batch.tokens["returns"])}
    lengths = torch.tensor(batch.lengths, dtype=torch.float64)
    metrics |= {"response/length": lengths.mean(), "response/truncated": batch.truncated.double().mean(), "progress/tokens": lengths.sum()}
    return {name: float(value) for name, value in metrics.items()}


def staleness(groups: Sequence[Group], step: int) -> float:
    """How many policy steps ago the responses were sampled, on average."""
    versions = [response.version for group in groups for response in group.responses]
    return sum(step - (step if version is None else version) for version in versions) / len(versions)


def sample_rows(rollout: Rollout) -> list[dict[str, Any]]:
    """Responses to read: the first of every prompt, with reward, its parts, and KL (0 where there is no reference)."""
    batch = rollout.batch
    reference = batch.tokens.get("logprobs_ref", batch.tokens["logprobs_old"])
    kl = batch.sum_by_response(batch.tokens["logprobs_old"] - reference).tolist()
    rows, index = [], 0
    for group, row in zip(batch.groups, rollout.scores, strict=True):
        response, score = group.responses[0], row[0]
        rows.append(sample_row(group.prompt, response, score.total, score.parts, kl[index]))
        index += len(group.responses)
    return rows


def merged(history: list[dict[str, float]]) -> dict[str, float]:
    """One step's inner updates as one row: means, extremes, what the very first update saw, and how often memory ran out in any."""
    short = {name: sum(row.get(name, 0.0) for row in history) for row in history for name in row if name.endswith("/out_of_memory")}
    merged = {name: sum(row[name] for row in history) / len(history) for name in history[0] if name not in short} | short
    if "policy/ratio_max" in merged:
        merged["policy/ratio_max"] = max(row["policy/ratio_max"] for row in history)
        merged["policy/ratio_min"] = 1 / max(row["policy/ratio_inverse_max"] for row in history)
        del merged["policy/ratio_inverse_max"]
        merged["policy/approx_kl"] = history[-1]["policy/approx_kl"]
        merged["policy/first_approx_kl"], merged["policy/first_ratio_max"] = history[0]["policy/approx_kl"], history[0]["policy/ratio_max"]
    return merged | {"progress/updates": float(len(history))}
