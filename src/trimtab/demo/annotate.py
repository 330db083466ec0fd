"""`trimtab annotate`: the simulated annotator compares sampled responses. A stand-in for people, and labelled as one."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import Field

from trimtab.config import Config
from trimtab.data.readers import read_rows
from trimtab.data.records import write_jsonl
from trimtab.demo.annotator import SimulatedAnnotator


class AnnotateConfig(Config):
    """A recipe of `trimtab annotate`."""

    samples: str = Field(description="JSON lines written by `trimtab sample` with output and n of at least 2")
    output: str = Field(description="where to write the comparisons, as JSON lines")
    temperature: float = Field(0.2, gt=0, description="noise: P(a over b) = sigmoid((gold(a) - gold(b)) / temperature)")
    pairs_per_group: int = Field(1, gt=0, description="comparisons per prompt")
    seed: int = Field(0, ge=0, description="decides every choice")


def annotate(config: AnnotateConfig) -> None:
    """Compare, and write the comparisons; prints how many there are and how often the annotator agrees with itself."""
