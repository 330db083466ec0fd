"""Random batches for both sides: ragged for trimtab, padded rows for TRL."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from trimtab import seeds
from trimtab.batch import Batch, Counts
from trimtab.maths.reductions import to_rows
from trimtab.types import Group, Prompt, Response

SEEDS = (0, 1, 2)
LONGEST = 11


def generator(seed: int) -> torch.Generator:
    return seeds.generator(seed, "differential")


def normal(g: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=g, dtype=torch.float64) * scale


LARGEST: dict[str, float] = {}
"""The largest difference each test has seen, relative to the larger of 1 and the value; reported at the end of the run."""


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-6) -> None:
    """Agreement to 1e-6 of the larger of 1 and the value."""
    ours, theirs = ours.detach().double(), theirs.double()
    assert ours.shape == theirs.shape
    difference = ((ours - theirs).abs() / theirs.abs().clamp(min=1)).max().item()
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition("/")[2].partition(" ")[0].partition("[")[0]
    LARGEST[test] = max(LARGEST.get(test, 0.0), difference)
    assert difference <= tolerance, f"differs by {difference:.1e}: {ours} and {theirs}"


def rollout(seed: int, groups: int = 3, size: int = 4, *, holes: bool = False, spread: float = 0.3) -> Batch:
    """Groups of responses of 1 to LONGEST tokens with every column a loss may read.

    holes:  some tokens are not the assistant's own (never a whole response).
    spread: standard deviation of the log-ratios per token; 0.3 takes many tokens beyond PPO's clip.
    """
    g = generator(seed)
    lengths = torch.randint(1, LONGEST + 1, (groups * size,), generator=g).tolist()
    responses = []
    for n in lengths:
        mask = (torch.rand(n, generator=g) < 0.7).tolist() if holes else [True] * n
        mask[0] = True
        responses.append(Response(tokens=(5,) * n, text="", truncated=bool(torch.rand((), generator=g) < 0.2), mask=tuple(mask)))
    prompt = Prompt(tokens=(5,), text="?")
    batch = Batch(tuple(Group(prompt, tuple(responses[i * size : (i + 1) * size])) for i in range(groups)))
    total = sum(lengths)
    old = -normal(g, total).abs() - 0.05
    near = {name: old + normal(g, total, scale=spread) for name in ("logprobs", "logprobs_ref", "logprobs_sampler")}
    values_old = normal(g, total)
    return batch.with_tokens(
        logprobs_old=old, values_old=values_old, values=values_old + normal(g, total, scale=0.3), advantages=normal(g, total),
        returns=normal(g, total), entropy=normal(g, total).abs(), **near,
    ).with_responses(reward=normal(g, groups * size))  # fmt: skip


def rows(batch: Batch, *names: str) -> dict[str, Tensor]:
    """Padded rows of token columns, and the two masks TRL knows: tokens that exist, tokens that are the assistant's own."""
    padded = {name: to_rows(batch.tokens[name], batch.lengths) for name in names}
    masks = {"present": torch.ones_like(batch.mask), "mask": batch.mask}
    return padded | {name: to_rows(mask.double(), batch.lengths).long() for name, mask in masks.items()}


def counts(batch: Batch) -> Counts:
    return Counts.of(batch)
