"""Which records come when: without replacement, without state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.data.cursor import Cursor

SIZES = st.integers(1, 30)


@given(count=SIZES, batch=SIZES, seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_every_epoch_shows_every_record_once(count: int, batch: int, seed: int, epochs: int) -> None:
    cursor = Cursor(count, batch, seed)
    steps = -(-count * epochs // batch)
    batches = [cursor.at(step) for step in range(steps)]
    assert all(len(indices) == batch for indices in batches)
    walk = [index for indices in batches for index in indices]
    for epoch in range(epochs):
        assert sorted(walk[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(count=SIZES, batch=SIZES, step=st.integers(0, 1000))
def test_a_step_depends_on_the_seed_and_the_step_alone(count: int, batch: int, step: int) -> None:
    walked = Cursor(count, batch, 3)
    walked.at(0)
    assert walked.at(step) == Cursor(count, batch, 3).at(step)


def test_the_order_is_the_same_on_every_machine() -> None:
    assert Cursor(10, 10, 0).at(0) == [6, 1, 8, 0, 7, 3, 4, 9, 5, 2]
    assert Cursor(10, 10, 0).at(1) == [7, 4, 3, 9, 8, 6, 5, 1, 0, 2]
    assert Cursor(10, 10, 1).at(0) == [2, 7, 0, 5, 1, 9, 4, 3, 8, 6]


def test_all_orders_are_about_equally_frequent() -> None:
    orders = [tuple(Cursor(3, 3, seed).at(0)) for seed in range(600)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(counts) < 140  # 100 expected, standard deviation 9


def test_epochs_are_counted_in_records() -> None:
    assert Cursor(8, 2, 0).epoch(3) == 0.75


def test_what_cannot_be_walked_is_refused() -> None:
    with pytest.raises(ValueError, match="needs records"):
        Cursor(0, 1, 0)
    with pytest.raises(ValueError, match="no step -1"):
        Cursor(1, 1, 0).at(-1)
