"""The one place where terms are added up: three objectives, the same however a minibatch is cut."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.maths.reductions import Aggregation, aggregate, mean_over_pairs, to_column, to_rows

Rows = list[list[tuple[float, bool]]]
rows_of_terms = st.lists(st.lists(st.tuples(st.floats(-5, 5), st.booleans()), min_size=1, max_size=5), min_size=1, max_size=5)


def packed(rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Terms, mask and response of every token."""
    cells = [(x, own, i) for i, row in enumerate(rows) for x, own in row]
    terms, mask, index = zip(*cells, strict=True)
    return torch.tensor(terms, dtype=torch.float64), torch.tensor(mask), torch.tensor(index)


def test_three_aggregations_are_three_objectives() -> None:
    terms = torch.tensor([1.0, 1.0, 1.0, 4.0])
    mask, index = torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 0, 1])
    sizes = {"tokens": 4, "responses": 2}
    assert float(aggregate(terms, mask, index, "token", **sizes)) == pytest.approx(7 / 4)
    assert float(aggregate(terms, mask, index, "sequence", **sizes)) == pytest.approx((1 + 4) / 2)
    assert float(aggregate(terms, mask, index, "fixed-length", **sizes, length=5)) == pytest.approx(7 / 10)


@given(rows_of_terms, st.sampled_from(get_args(Aggregation)), st.integers(1, 9))
@settings(max_examples=80, deadline=None)
def test_weights_of_tokens_in_closed_form(rows: Rows, how: Aggregation, length: int) -> None:
    terms, mask, index = packed(rows)
    own = [sum(mine for _, mine in row) for row in rows]
    leaf = terms.clone().requires_grad_()
    loss = aggregate(leaf, mask, index, how, tokens=sum(own), responses=len(rows), length=length)
    weight = {
        "token": [1 / max(1, sum(own))] * len(rows),
        "sequence": [1 / max(1, n) / len(rows) for n in own],
        "fixed-length": [1 / (len(rows) * length)] * len(rows),
    }[how]
    expected = [weight[i] * bool(mine) for i, mine in zip(index.tolist(), mask, strict=True)]
    assert torch.autograd.grad(loss, leaf)[0].tolist() == pytest.approx(expected, abs=1e-12)
    assert loss.item() == pytest.approx(float((terms * torch.tensor(expected, dtype=torch.float64)).sum()), abs=1e-9)


@given(rows_of_terms, st.sampled_from(get_args(Aggregation)), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_pieces_in_any_order_add_up_to_the_whole(rows: Rows, how: Aggregation, random: object) -> None:
    sizes = {"tokens": sum(mine for row in rows for _, mine in row), "responses": len(rows), "length": 7}
    whole = float(aggregate(*packed(rows), how, **sizes))
    shuffled = list(rows)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    pieces = [float(aggregate(*packed([row]), how, **sizes)) for row in shuffled]
    assert sum(pieces) == pytest.approx(whole, abs=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(-5, 5)), min_size=1, max_size=10))
@settings(max_examples=50, deadline=None)
def test_a_prompt_with_many_pairs_weighs_as_much_as_one_with_one(pairs: list[tuple[int, float]]) -> None:
    names = sorted({group for group, _ in pairs})
    group = torch.tensor([names.index(g) for g, _ in pairs])
    terms = torch.tensor([x for _, x in pairs], dtype=torch.float64).requires_grad_()
    loss = mean_over_pairs(terms, group, groups=len(names))
    means = [float(terms.detach()[group == g].mean()) for g in range(len(names))]
    assert loss.item() == pytest.approx(sum(means) / len(names), abs=1e-9)
    expected = [1 / int((group == g).sum()) / len(names) for g in group]
    assert torch.autograd.grad(loss, terms)[0].tolist() == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_rows_and_columns_are_each_others_inverse_and_padding_is_zero(lengths: list[int]) -> None:
    leaf = torch.arange(1.0, sum(lengths) + 1).double().requires_grad_()
    rows = to_rows(leaf, lengths)
    assert rows.shape == (len(lengths), max(lengths))
    assert int((rows != 0).sum()) == sum(lengths)
    back = to_column(rows, lengths)
    assert torch.equal(back, leaf)
    weight = torch.arange(sum(lengths)).double()
    assert torch.equal(torch.autograd.grad((back * weight).sum(), leaf)[0], weight)
