"""A step of policy learning as a file: RUN/steps/step-N.jsonl, one response a line, one entry a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.batch import Batch
from trimtab.data.records import write_jsonl
from trimtab.data.templates import Template
from trimtab.types import Score

COLUMNS = {
    "logprob": "logprobs_old", "reference": "logprobs_ref", "now": "logprobs_now", "reward_score": "reward_score", "reward_kl": "reward_kl",
    "value": "value", "td_error": "td_error", "advantage": "advantages", "advantage_reward": "advantage_reward",
    "advantage_kl": "advantage_kl", "advantage_value": "advantage_value", "advantage_baseline": "advantage_baseline", "clipped": "clipped",
    "gradient_weight": "gradient_weight",
}  # fmt: skip
"""What is written of every token, and the batch's column it comes from. `logprob` is of the policy that sampled, `now` after the update."""


@dataclass(frozen=True)
class Explained:
    """Some groups of a step with all the columns above, their scores, and the template that turns tokens into text."""

    batch: Batch
    scores: Sequence[Sequence[Score]]
    template: Template


def write_explanation(run: Path, step: int, explained: Explained) -> Path:
    """Write RUN/steps/step-N.jsonl; the file appears whole or not at all."""
    path = run / "steps" / f"step-{step:06d}.jsonl"
    write_jsonl(path, rows(explained))
    return path


def rows(explained: Explained) -> list[dict[str, Any]]:
    """One mapping per response: prompt, text, score and its parts, reward after shaping, tokens, and the token columns."""
    batch = explained.batch
    columns = {name: batch.tokens[source].split(batch.lengths) for name, source in COLUMNS.items() if source in batch.tokens}
    found, index = [], 0
    for group, scores in zip(batch.groups, explained.scores, strict=True):
        for response, score in zip(group.responses, scores, strict=True):
            found.append(
                {
                    "prompt": group.prompt.as_text,
                    "response": response.text,
                    "truncated": response.truncated,
                    "score": score.total,
                    "parts": dict(score.parts),
                    "reward": float(batch.responses["reward"][index]),
                    "tokens": explained.template.tokenizer.batch_decode([[token] for token in response.tokens]),
                    **{name: column[index].tolist() for name, column in columns.items()},
                }
            )
            index += 1
    return found
