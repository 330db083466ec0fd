"""`trimtab annotate`: the simulated annotator ranks sampled responses. A stand-in for people, and labelled as one."""

from __future__ import annotations

from pydantic import Field

from trimtab.config import Config
from trimtab.data.readers import read_rows
from trimtab.data.records import group_row, write_jsonl
from trimtab.demo.annotator import SimulatedAnnotator
from trimtab.types import Group, Prompt, Response


class AnnotateConfig(Config):
    """A recipe of `trimtab annotate`."""

    samples: str = Field(description="JSON lines written by `trimtab sample` with output and n of at least 2")
    output: str = Field(description="where to write the rankings, as JSON lines")
    temperature: float = Field(0.2, gt=0, description="noise: P(a over b) = sigmoid((gold(a) - gold(b)) / temperature)")
    seed: int = Field(0, ge=0, description="decides every choice")


def annotate(config: AnnotateConfig) -> None:
    """Rank the responses to every prompt; prints how many pairs that makes, and how often they agree with the gold reward."""
    annotator, groups = SimulatedAnnotator(), []
    for row in read_rows(config.samples):
        prompt = Prompt((0,), row.values["prompt"])  # the annotator reads text; tokens play no part
        answers = zip(row.values["responses"], row.values["truncated"], strict=True)
        groups.append(Group(prompt, tuple(Response((0,), text, truncated=cut) for text, cut in answers)))
    ranked = annotator.rank(groups, config.temperature, config.seed)
    write_jsonl(config.output, [group_row(comparison.group) for comparison in ranked])
    pairs = sum(len(comparison.pairs()) for comparison in ranked)
    print(
        f"annotated {len(ranked)} prompts, {pairs} pairs; the noisy choice agrees with the gold reward in {annotator.agreement(ranked):.1%}"
    )
