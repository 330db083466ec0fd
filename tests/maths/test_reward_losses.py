"""Reward-model losses: closed-form gradients, identities, and the signs and orders that are easily got wrong."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.maths.reward_losses import (
    bradley_terry,
    calibration,
    centring,
    hinge,
    list_sum,
    normalisation,
    outcome_bce,
    plackett_luce,
    pointwise,
    process_bce,
    segment_hinge,
)

number = st.floats(-20, 20)
scores = st.lists(number, min_size=1, max_size=7)
steady = settings(deadline=None, derandomize=True)


def leaf(*x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float64, requires_grad=True)


def gradient(loss: Tensor, *inputs: Tensor) -> list[list[float]]:
    return [g.tolist() for g in torch.autograd.grad(loss.sum(), inputs)]


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@steady
@given(number, number, st.floats(0, 5), st.floats(0, 1), st.floats(0, 0.5))
def test_bradley_terry_gradient_is_probability_minus_label(a: float, b: float, margin: float, p: float, smoothing: float) -> None:
    chosen, rejected = leaf(a), leaf(b)
    q = p * (1 - smoothing) + (1 - p) * smoothing
    ((up,), (down,)) = gradient(bradley_terry(chosen, rejected, margin, p, smoothing), chosen, rejected)
    assert up == pytest.approx(sigma(a - b - margin) - q, abs=1e-12)
    assert down == -up


@steady
@given(number, number, st.floats(0, 5), st.floats(0, 1))
def test_soft_label_one_is_a_plain_choice_and_labels_mix_linearly(a: float, b: float, margin: float, p: float) -> None:
    chosen, rejected = leaf(a), leaf(b)
    plain = -torch.nn.functional.logsigmoid(chosen - rejected - margin)
    assert bradley_terry(chosen, rejected, margin, 1.0, 0.0).item() == plain.item()
    flipped = bradley_terry(chosen, rejected, margin, 0.0)
    mixed = bradley_terry(chosen, rejected, margin, p)
    assert mixed.item() == pytest.approx(p * plain.item() + (1 - p) * flipped.item(), abs=1e-9)
    assert bradley_terry(chosen, rejected, margin, 1.0, 0.2).item() == pytest.approx(
        bradley_terry(chosen, rejected, margin, 0.8).item(), abs=1e-12
    )


@steady
@given(scores, st.floats(-50, 50))
def test_choices_do_not_see_a_constant(r: list[float], shift: float) -> None:
    x = leaf(*r)
    for loss in (list_sum, plackett_luce):
        assert loss(x + shift).tolist() == pytest.approx(loss(x).tolist(), abs=1e-9)
    if len(r) > 1:
        pair, moved = x[:1], x[1:2]
        assert bradley_terry(pair + shift, moved + shift).item() == pytest.approx(bradley_terry(pair, moved).item(), abs=1e-9)
        assert hinge(pair + shift, moved + shift).item() == pytest.approx(hinge(pair, moved).item(), abs=1e-9)


@steady
@given(number, number)
def test_a_ranking_of_two_is_a_pair(a: float, b: float) -> None:
    pair = bradley_terry(leaf(a), leaf(b)).item()
    assert plackett_luce(leaf(a, b)).tolist() == pytest.approx([pair, 0.0], abs=1e-9)
    assert list_sum(leaf(a, b)).tolist() == pytest.approx([pair], abs=1e-12)


@steady
@given(scores)
def test_plackett_luce_gradient_and_likelihood_in_closed_form(r: list[float]) -> None:
    x = leaf(*r)
    (got,) = gradient(plackett_luce(x), x)
    weights = [math.exp(v - max(r)) for v in r]
    left = [sum(weights[k:]) for k in range(len(r))]
    wanted = [sum(weights[i] / left[k] for k in range(i + 1)) - 1 for i in range(len(r))]
    if min(left) > 1e-12:  # the plain quotient underflows long before the log-sum-exp does
        assert got == pytest.approx(wanted, abs=1e-8)
    assert sum(got) == pytest.approx(0, abs=1e-9)


def test_plackett_luce_probabilities_of_all_rankings_add_up_to_one() -> None:
    from itertools import permutations

    r = leaf(0.3, -1.0, 2.0, 0.1)
    total = sum(math.exp(-plackett_luce(r[list(order)]).sum().item()) for order in permutations(range(4)))
    assert total == pytest.approx(1, abs=1e-12)


@steady
@given(st.lists(number, min_size=2, max_size=6))
def test_a_list_is_its_pairs_each_once(r: list[float]) -> None:
    x = leaf(*r)
    n = len(r)
    terms = list_sum(x)
    wanted = [bradley_terry(x[a : a + 1], x[b : b + 1]).item() for a in range(n) for b in range(a + 1, n)]
    assert terms.tolist() == pytest.approx(wanted, abs=1e-12)
    assert len(terms) == math.comb(n, 2)


def test_both_orders_of_a_pair_would_ask_for_equal_scores() -> None:
    x = leaf(1.5, 0.0)
    ((best, worst),) = gradient(list_sum(x), x)
    assert best < 0 < worst  # descent raises the better one
    both = list_sum(x).sum() + list_sum(x.flip(0)).sum()
    ((wrong_best, _),) = gradient(both, x)
    assert wrong_best > 0  # descent would lower the better one


@steady
@given(number, number, st.floats(0.01, 5))
def test_a_better_winner_never_costs_more(a: float, b: float, step: float) -> None:
    for loss in (bradley_terry, hinge):
        assert loss(leaf(a + step), leaf(b)).item() <= loss(leaf(a), leaf(b)).item()
        assert loss(leaf(a), leaf(b + step)).item() >= loss(leaf(a), leaf(b)).item()
    assert plackett_luce(leaf(a + step, b, 0.0)).sum().item() <= plackett_luce(leaf(a, b, 0.0)).sum().item() + 1e-12


@steady
@given(number, number, st.floats(0, 5))
def test_hinge_is_zero_beyond_the_margin_and_linear_within(a: float, b: float, margin: float) -> None:
    chosen, rejected = leaf(a), leaf(b)
    loss = hinge(chosen, rejected, margin)
    assert loss.item() == max(0.0, margin - (a - b))
    inside = float(a - b < margin)
    assert gradient(loss, chosen, rejected) == [[-inside], [inside]]


@steady
@given(number, number)
def test_pointwise_pulls_a_score_to_its_rating(a: float, rating: float) -> None:
    score = leaf(a)
    ((slope,),) = gradient(pointwise(score, leaf(rating).detach()), score)
    assert slope == pytest.approx(2 * (a - rating), abs=1e-12)
    nearer = a - 0.1 * slope
    assert pointwise(leaf(nearer), leaf(rating)).item() <= pointwise(score, leaf(rating)).item()
    printed = a + 0.1 * slope  # descent on the square with a minus sign
    assert pointwise(leaf(printed), leaf(rating)).item() >= pointwise(score, leaf(rating)).item()


@steady
@given(number, number)
def test_centring_pulls_the_sum_to_zero_and_leaves_the_difference(a: float, b: float) -> None:
    chosen, rejected = leaf(a), leaf(b)
    ((up,), (down,)) = gradient(centring(chosen, rejected), chosen, rejected)
    assert up == down == pytest.approx(2 * (a + b), abs=1e-12)
    assert abs(a - 0.1 * up + b - 0.1 * down) <= abs(a + b)
    assert abs(a + 0.1 * up + b + 0.1 * down) >= abs(a + b)  # with the minus sign of some texts the sum runs away


@steady
@given(st.lists(st.tuples(number, st.sampled_from([0.0, 1.0]), st.booleans()), min_size=1, max_size=8))
def test_process_gradient_is_probability_minus_label_on_judged_steps_only(rows: list[tuple[float, float, bool]]) -> None:
    logits, labels = leaf(*(row[0] for row in rows)), leaf(*(row[1] for row in rows)).detach()
    mask = torch.tensor([row[2] for row in rows])
    (got,) = gradient(process_bce(logits, labels, mask), logits)
    assert got == pytest.approx([(sigma(x) - y) * kept for x, y, kept in rows], abs=1e-12)
    wanted = [-math.log(sigma(x if y else -x)) * kept for x, y, kept in rows]
    assert process_bce(logits, labels, mask).tolist() == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("poison", [1e6, -3.0, math.nan, math.inf])
def test_what_a_masked_token_holds_changes_nothing_bit_for_bit(poison: float) -> None:
    mask = torch.tensor([True, False, True, False])
    outcome, owner = leaf(1.0, 0.0).detach(), torch.tensor([0, 0, 1, 1])
    clean = leaf(0.5, 0.25, -1.0, 2.0)
    dirty = torch.where(mask, clean, poison).detach().requires_grad_()
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    spoilt = torch.where(mask, labels, poison)
    for loss in (lambda x, y: process_bce(x, y, mask), lambda x, _: outcome_bce(x, outcome, owner, mask)):
        assert torch.equal(loss(clean, labels), loss(dirty, spoilt))
        assert gradient(loss(clean, labels), clean) == gradient(loss(dirty, spoilt), dirty)


@steady
@given(st.lists(number, min_size=4, max_size=4), st.sampled_from([(0.0, 1.0), (1.0, 1.0), (1.0, 0.0)]))
def test_outcome_judges_every_token_by_its_responses_end(r: list[float], ends: tuple[float, float]) -> None:
    owner, mask = torch.tensor([0, 1, 1, 1]), torch.tensor([True, True, False, True])
    logits, outcome = leaf(*r), leaf(*ends).detach()
    per_token = leaf(ends[0], ends[1], ends[1], ends[1]).detach()
    assert torch.equal(outcome_bce(logits, outcome, owner, mask), process_bce(logits, per_token, mask))


@steady
@given(number, st.sampled_from([-1.0, 1.0]))
def test_segment_hinge_gradient(r: float, sign: float) -> None:
    score = leaf(r)
    loss = segment_hinge(score, leaf(sign).detach())
    assert loss.item() == max(0.0, 1 - r * sign)
    assert gradient(loss, score) == [[-sign if r * sign < 1 else 0.0]]


def test_calibration_by_hand_and_of_a_calibrated_source() -> None:
    found = calibration(torch.tensor([0.05, 0.05, 0.95, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0]))
    assert found.counts == [2, 2]
    assert found.predicted == pytest.approx([0.05, 0.975])
    assert found.observed == [0.5, 1.0]
    assert found.error == pytest.approx(0.5 * 0.45 + 0.5 * 0.025)
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(20_000, generator=generator, dtype=torch.float64)
    happened = (torch.rand(20_000, generator=generator, dtype=torch.float64) < p).double()
    assert calibration(p, happened).error < 0.02
    assert calibration(p.sqrt(), happened).error > 0.1


@steady
@given(st.lists(number, min_size=2, max_size=9), number, st.floats(0.1, 5))
def test_normalisation_gives_the_target_mean_and_spread(r: list[float], mean: float, deviation: float) -> None:
    x = leaf(*r).detach()
    if x.std(correction=0) < 1e-6:
        return
    gain, bias = normalisation(x, mean, deviation)
    assert float((gain * x + bias).mean()) == pytest.approx(mean, abs=1e-6)
    assert float((gain * x + bias).std(correction=0)) == pytest.approx(deviation, rel=1e-6)


def test_scores_without_spread_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match="all scores are equal"):
        normalisation(torch.ones(3))
