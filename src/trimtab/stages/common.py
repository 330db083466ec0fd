"""What every stage's recipe has, and what several stages do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, create_model

from trimtab.batch import Batch, Counts, Loss, LossFunction, Outputs
from trimtab.config import Config
from trimtab.errors import DataError
from trimtab.maths.reductions import Aggregation, aggregate
from trimtab.protocols import Tracker
from trimtab.rewards.isolation import Failures
from trimtab.training.checkpoint import CheckpointConfig
from trimtab.training.guards import GuardsConfig
from trimtab.types import Comparison, Group, Prompt, Response, Score

SHOWN_FAILURES = 3
"""Responses without a score that are written down at a step."""


class StageConfig(Config):
    """Settings common to all stages."""

    output: str = Field(description="the run directory to write")
    seed: int = Field(0, ge=0, description="decides every random draw of the run")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="when the run is saved")
    guards: GuardsConfig = Field(default_factory=GuardsConfig, description="what is done about steps that go wrong")
    resume: Literal["never", "auto"] = Field("never", description="auto: go on with the run that is in output, if there is one")
    trackers: list[str] = Field(default_factory=list, description="also report to: tensorboard, wandb, mlflow")


def recipe_type(name: str, base: type[StageConfig], algorithm: type[Config]) -> Any:
    """The recipe of a stage that serves many algorithms, with `algorithm` holding the settings of this one."""
    return create_model(  # type: ignore[call-overload]
        f"{name.upper()}RecipeConfig",
        __base__=base,
        __doc__=f"A recipe of `trimtab {name}`.",
        output=(str, Field(f"runs/{name}", description="the run directory to write")),
        algorithm=(algorithm, Field(default_factory=algorithm, description=f"settings of {name}")),
    )


def check_lengths(groups: list[Group], context: int, what: str) -> None:
    """Refuse data that the model cannot read, before any time is spent on it."""
    longest = max(groups, key=lambda g: len(g.prompt.tokens) + max((len(r.tokens) for r in g.responses), default=0))
    tokens = len(longest.prompt.tokens) + max((len(r.tokens) for r in longest.responses), default=0)
    if tokens > context:
        raise DataError(
            f"{what} has {tokens} tokens, the model reads at most {context} (prompt {longest.prompt.as_text[:50]!r}...)",
            where="data",
            fix="set data.max_prompt_tokens and data.max_response_tokens, with data.on_long=skip or truncate",
        )


def nll_loss(aggregation: Aggregation) -> LossFunction:
    """-sum_t log pi(y_t | x, y_<t) over the assistant's own tokens: the loss of supervised fine-tuning."""

    def loss(outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.logprobs is not None
        sizes = {"tokens": counts.tokens, "responses": counts.responses}
        value = aggregate(-outputs.logprobs, batch.mask, batch.response_of_token, aggregation, **sizes)
        nll = -(outputs.logprobs * batch.mask).sum() / counts.tokens
        return Loss(value, {"loss/nll": nll})

    return loss


def comparison_batch(comparisons: Sequence[Comparison]) -> Batch:
    """Comparisons as one batch: response columns `judgement` (higher is better) and `margin` (of the pair)."""
    judgement = [score for c in comparisons for score in c.scores]
    margin = [c.margin for c in comparisons for _ in c.scores]
    columns = {"judgement": torch.tensor(judgement, dtype=torch.float64), "margin": torch.tensor(margin, dtype=torch.float64)}
    return Batch(tuple(c.group for c in comparisons), {}, columns)


def part_means(scores: Sequence[Score]) -> dict[str, Any]:
    """The mean of every named part, where there are several, over the scores that have it: one that failed may have none."""
    names = dict.fromkeys(name for score in scores for name in score.parts)
    if len(names) < 2:
        return {}
    return {f"reward/{name}": torch.tensor([score.parts[name] for score in scores if name in score.parts]).mean() for name in names}


def report_failures(tracker: Tracker, step: int, failures: Failures) -> None:
    """The first responses of a step that could not be scored, as events."""
    for failed in failures.failed[:SHOWN_FAILURES]:
        tracker.event("reward failed", step=step, prompt=failed.prompt, response=failed.response, reason=failed.reason)


def sample_row(prompt: Prompt, response: Response, reward: float, parts: Mapping[str, float], kl: float) -> dict[str, Any]:
    """One line of samples.jsonl."""
    return {
        "prompt": prompt.as_text,
        "response": response.text,
        "reward": reward,
        "parts": dict(parts),
        "kl": kl,
        "tokens": len(response.tokens),
        "truncated": response.truncated,
    }
