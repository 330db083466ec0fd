"""A batch is cut into micro-batches that hold its responses once each and in order, with their columns."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.batch import Batch, Outputs, observe
from trimtab.types import Group, Prompt, Response

sizes = st.integers(1, 9)
groups = st.lists(st.tuples(sizes, st.lists(sizes, min_size=1, max_size=6)), min_size=1, max_size=5)


def made(shape: list[tuple[int, list[int]]], *, apart: bool) -> Batch:
    """Prompts and responses of these lengths, and columns that number tokens and responses."""
    batch = Batch(tuple(Group(Prompt((1,) * p, ""), tuple(Response((2,) * n, "") for n in lengths)) for p, lengths in shape), apart=apart)
    return batch.with_tokens(place=torch.arange(sum(batch.lengths))).with_responses(row=torch.arange(len(batch.lengths)))


def held(batch: Batch) -> int:
    return sum(group.token_count for group in batch.groups)


@given(groups, st.integers(1, 60), st.booleans())
def test_micro_batches_hold_everything_once_and_in_order(shape: list[tuple[int, list[int]]], budget: int, apart: bool) -> None:
    batch = made(shape, apart=apart)
    pieces = batch.micro_batches(budget)
    assert torch.equal(torch.cat([piece.tokens["place"] for piece in pieces]), batch.tokens["place"])
    assert torch.equal(torch.cat([piece.responses["row"] for piece in pieces]), batch.responses["row"])
    assert [r for piece in pieces for g in piece.groups for r in g.responses] == [r for g in batch.groups for r in g.responses]
    for piece in pieces:
        smallest = len(piece.lengths) if apart else len(piece.groups)
        assert held(piece) <= budget or smallest == 1
        assert piece.apart == apart
    for first, second in pairwise(pieces):
        assert held(first) + held(Batch(second.groups[:1])) > budget  # nothing is cut that fits


@given(groups, st.integers(1, 60))
def test_a_group_that_fits_is_never_cut(shape: list[tuple[int, list[int]]], budget: int) -> None:
    batch = made(shape, apart=True)
    whole = {id(group) for piece in batch.micro_batches(budget) for group in piece.groups}
    assert all(id(group) in whole for group in batch.groups if group.token_count <= budget)


def test_a_group_is_cut_into_parts_of_about_one_size() -> None:
    batch = made([(94, [64] * 8)], apart=True)
    assert [len(piece.lengths) for piece in batch.micro_batches(464)] == [4, 4]
    assert [len(piece.lengths) for piece in batch.micro_batches(300)] == [3, 3, 2]
    assert [len(piece.lengths) for piece in batch.micro_batches(10)] == [1] * 8
    assert [len(piece.lengths) for piece in made([(94, [64] * 8)], apart=False).micro_batches(464)] == [8]


@given(groups)
def test_budgets_get_smaller_until_every_response_is_alone(shape: list[tuple[int, list[int]]]) -> None:
    batch = made(shape, apart=True)
    budget: int | None = held(batch)
    while budget is not None:
        last, budget = budget, batch.smaller(budget)
        assert budget is None or budget < last
    assert all(len(piece.lengths) == 1 for piece in batch.micro_batches(last))


def test_what_is_said_of_a_cut_group_is_what_is_said_of_it_whole() -> None:
    batch, seen = made([(5, [3, 4, 2]), (2, [6])], apart=False), []

    def forward(micro: Batch) -> Outputs:
        seen.append(held(micro))
        return Outputs(logprobs=micro.tokens["place"].double(), scores=micro.responses["row"].double())

    said = observe(batch, forward, token_budget=9)
    assert max(seen) <= 9
    assert said.logprobs is not None
    assert said.scores is not None
    assert said.logprobs.tolist() == list(range(15))
    assert said.scores.tolist() == [0, 1, 2, 3]
