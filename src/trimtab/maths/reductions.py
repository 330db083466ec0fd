"""From per-token terms to one number. Losses return terms; this is the only place where they are added up.

Dividing by *global* counts (of the whole minibatch, over all micro-batches and ranks) makes the update the same however the
minibatch is cut.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Aggregation = Literal["token", "sequence", "fixed-length"]


def aggregate(
    terms: Float[Tensor, " tokens"],
    mask: Bool[Tensor, " tokens"],
    response_of_token: Int[Tensor, " tokens"],
    how: Aggregation,
    *,
    tokens: int,
    responses: int,
    length: int = 1,
) -> Float[Tensor, ""]:
    """Add up per-token terms; three different objectives (Yu et al. 2025, Liu et al. 2025):

    "token":        sum_{i,t} l_it / N,                every token weighs the same (N = `tokens`, global)
    "sequence":     sum_i (1/|y_i|) sum_t l_it / B,    every response weighs the same (B = `responses`, global)
    "fixed-length": sum_{i,t} l_it / (B L),            as Dr. GRPO: no length in the weight (L = `length`, a constant)
    """
    kept = terms * mask  # a masked term is finite by construction: it is exactly zero times a finite number
    if how == "token":
        return kept.sum() / max(1, tokens)
    if how == "fixed-length":
        return kept.sum() / (responses * length)
    count = torch.zeros(int(response_of_token[-1]) + 1, dtype=terms.dtype).index_add(0, response_of_token, mask.to(terms.dtype))
    return (kept / count.clamp(min=1)[response_of_token]).sum() / responses


def mean_over_pairs(terms: Float[Tensor, " pairs"], group: Int[Tensor, " pairs"], *, groups: int) -> Float[Tensor, ""]:
    """Mean over the pairs of each group, then over groups: sum_g (1/P_g) sum_{p in g} l_p / G  (G = `groups`, global).

    A prompt with many ranked responses weighs as much as one with two.
    """
    return (terms / torch.bincount(group)[group]).sum() / groups


def to_rows(column: Float[Tensor, " tokens"], lengths: list[int]) -> Float[Tensor, "responses time"]:
    """A token column as one zero-padded row per response."""
    return torch.nn.utils.rnn.pad_sequence(list(column.split(lengths)), batch_first=True)


def to_column(rows: Float[Tensor, "responses time"], lengths: list[int]) -> Float[Tensor, " tokens"]:
    """The inverse of `to_rows`: padding is dropped."""
    return torch.cat([row[:n] for row, n in zip(rows, lengths, strict=True)])
