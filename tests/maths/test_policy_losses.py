"""Surrogates: the textbook's table, gradients in closed form, and responses against direct loops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.maths.policy_losses import (
    clipped_importance,
    geometric_clip,
    importance_weighted,
    mismatch_weights,
    ppo_clip,
    response_mean,
    response_sum,
    sequence_clip,
    soft_gate,
)
from trimtab.maths.reductions import aggregate

advantage = st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3)
log_ratio = st.floats(-2, 2)
bound = st.floats(0.05, 0.9)


def column(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def slope(surrogate: Callable[[Tensor], Tensor], log_rho: float) -> tuple[float, float]:
    """A surrogate's value at a log-ratio (the old log-probability is 0), and its derivative with respect to log pi."""
    logprob = column(log_rho).requires_grad_()
    loss = surrogate(logprob)
    return loss.item(), float(torch.autograd.grad(loss.sum(), logprob)[0])


# (advantage, ratio) -> (objective, derivative with respect to the ratio)
TABLE = [
    (1.0, 0.5, 0.5, 1.0),
    (1.0, 0.9, 0.9, 1.0),
    (1.0, 1.1, 1.1, 1.0),
    (1.0, 1.5, 1.2, 0.0),
    (1.0, 3.0, 1.2, 0.0),
    (-1.0, 0.5, -0.8, 0.0),
    (-1.0, 0.9, -0.9, -1.0),
    (-1.0, 1.1, -1.1, -1.0),
    (-1.0, 1.5, -1.5, -1.0),
    (-1.0, 3.0, -3.0, -1.0),
]
UNEQUAL = [
    (1.0, 1.25, 1.25, 1.0),  # between 1 + low and 1 + high: still free
    (1.0, 1.5, 1.28, 0.0),
    (1.0, 0.1, 0.1, 1.0),  # the lower bound is not for positive advantages
    (-1.0, 0.75, -0.8, 0.0),
    (-1.0, 1.5, -1.5, -1.0),
]
DUAL = [
    (-1.0, 2.9, -2.9, -1.0),
    (-1.0, 3.5, -3.0, 0.0),  # the loss of a negative advantage stays below 3
    (-1.0, 0.5, -0.8, 0.0),
    (1.0, 3.5, 1.2, 0.0),  # positive ones do not know of it
    (1.0, 0.5, 0.5, 1.0),
]
ROWS = [(*row, 0.2, None, None) for row in TABLE] + [(*row, 0.2, 0.28, None) for row in UNEQUAL] + [(*row, 0.2, None, 3.0) for row in DUAL]


@pytest.mark.parametrize(("a", "ratio", "objective", "derivative", "low", "high", "dual"), ROWS)
def test_clip_table(
    a: float, ratio: float, objective: float, derivative: float, low: float, high: float | None, dual: float | None
) -> None:
    loss, gradient = slope(lambda p: ppo_clip(p, column(0), column(a), low, high, dual)[0], math.log(ratio))
    assert -loss == pytest.approx(objective, abs=1e-12)
    assert -gradient / ratio == pytest.approx(derivative, abs=1e-12)  # d / d log rho = rho d / d rho
    clipped = ppo_clip(column(math.log(ratio)), column(0), column(a), low, high, dual)[1]
    assert bool(clipped) == (derivative == 0)


@given(advantage, log_ratio)
@settings(max_examples=50, deadline=None)
def test_clip_of_no_width_only_ever_takes_back(a: float, log_rho: float) -> None:
    assume(abs(log_rho) > 1e-6)
    loss, gradient = slope(lambda p: ppo_clip(p, column(0), column(a), 0.0)[0], log_rho)
    favours = log_rho * a > 0
    assert loss == pytest.approx(-a if favours else -a * math.exp(log_rho), abs=1e-12)
    assert gradient == pytest.approx(0.0 if favours else -a * math.exp(log_rho), abs=1e-12)


@given(advantage, log_ratio)
@settings(max_examples=50, deadline=None)
def test_importance_weighted_gradient(a: float, log_rho: float) -> None:
    loss, gradient = slope(lambda p: importance_weighted(p, column(0), column(a)), log_rho)
    assert loss == gradient == pytest.approx(-math.exp(log_rho) * a, rel=1e-12)


@given(advantage, log_ratio, bound, bound, st.none() | st.floats(1.1, 5))
@settings(max_examples=150, deadline=None)
def test_clip_gradient_is_that_of_the_ratio_or_nothing(a: float, log_rho: float, low: float, high: float, dual: float | None) -> None:
    rho = math.exp(log_rho)
    assume(min(abs(rho - 1 + low), abs(rho - 1 - high), abs(rho - (dual or 9))) > 1e-6)
    loss, gradient = slope(lambda p: ppo_clip(p, column(0), column(a), low, high, dual)[0], log_rho)
    free = rho < 1 + high if a > 0 else 1 - low < rho < (dual or math.inf)
    assert gradient == pytest.approx(-rho * a if free else 0.0, abs=1e-12)
    cap = math.inf if dual is None or a > 0 else -dual * a
    assert loss == pytest.approx(min(-min(rho * a, min(max(rho, 1 - low), 1 + high) * a), cap), abs=1e-12)


@given(advantage, log_ratio, bound, bound)
@settings(max_examples=50, deadline=None)
def test_a_clipped_weight_never_takes_the_gradient_away(a: float, log_rho: float, low: float, high: float) -> None:
    _, gradient = slope(lambda p: clipped_importance(p, column(0), column(a), low, high)[0], log_rho)
    weight = min(max(math.exp(log_rho), 1 - low), 1 + high)
    assert gradient == pytest.approx(-weight * a, rel=1e-12)
    _, clipped = clipped_importance(column(log_rho), column(0), column(a), low, high)
    assert bool(clipped) == (weight != math.exp(log_rho))


@given(advantage, log_ratio, st.floats(0.3, 3), st.floats(0.3, 3))
@settings(max_examples=80, deadline=None)
def test_soft_gate_gradient_falls_off_smoothly_from_one(a: float, log_rho: float, positive: float, negative: float) -> None:
    def gate(p: Tensor) -> Tensor:
        return soft_gate(p, column(0), column(a), positive, negative)

    rho, tau = math.exp(log_rho), positive if a > 0 else negative
    sigma = 1 / (1 + math.exp(-tau * (rho - 1)))
    loss, gradient = slope(gate, log_rho)
    assert loss == pytest.approx(-4 / tau * sigma * a, rel=1e-10)
    assert gradient == pytest.approx(-4 * sigma * (1 - sigma) * rho * a, rel=1e-10)
    assert slope(gate, 0.0)[1] == pytest.approx(-a, rel=1e-12)  # weight 1 at rho = 1
    assert abs(gradient) <= abs(a) * rho + 1e-12


def test_clipping_the_ratio_first_is_wrong_for_negative_advantages() -> None:
    ratio = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    right = -ppo_clip(ratio.log(), torch.zeros(3, dtype=torch.float64), -torch.ones(3, dtype=torch.float64), 0.2)[0]
    printed = torch.minimum(ratio, ratio.clamp(0.8, 1.2)) * -1
    assert (right - printed).abs().tolist() == pytest.approx([0.3, 0.3, 1.8])


def test_at_the_sampling_policy_the_gradient_is_the_policy_gradient() -> None:
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.manual_seed(0))
    actions, advantages = torch.tensor([0, 3, 6, 2, 2]), torch.randn(5, dtype=torch.float64, generator=torch.manual_seed(1))
    grads = []
    for surrogate in (lambda p: ppo_clip(p, p.detach(), advantages, 0.2)[0], lambda p: importance_weighted(p, p.detach(), advantages)):
        leaf = logits.clone().requires_grad_()
        logprobs = torch.log_softmax(leaf, -1).gather(1, actions[:, None])[:, 0]
        surrogate(logprobs).sum().backward()
        grads.append(leaf.grad)
    assert (grads[0] - grads[1]).abs().max() < 1e-15


# Responses of one advantage each: (advantage, [(log-ratio, is the policy's own), ...]). Every response has a token of its own.
token = st.tuples(st.floats(-1, 1), st.booleans())
tokens = st.lists(token, min_size=1, max_size=5).filter(lambda row: any(own for _, own in row))
responses = st.lists(st.tuples(advantage, tokens), min_size=1, max_size=4)
Rows = list[tuple[float, list[tuple[float, bool]]]]


def packed(rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-ratios, advantages, mask and response of every token."""
    cells = [(x, a, own, i) for i, (a, row) in enumerate(rows) for x, own in row]
    ratios, advantages, mask, index = map(list, zip(*cells, strict=True))
    return column(*ratios), column(*advantages), torch.tensor(mask), torch.tensor(index)


def by_response(surrogate: Callable[..., tuple[Tensor, Tensor]], rows: Rows, low: float, high: float) -> tuple[float, list[float]]:
    """The loss with each response weighing the same, and its gradient for every token."""
    ratios, advantages, mask, index = packed(rows)
    logprobs = ratios.clone().requires_grad_()
    terms, _ = surrogate(logprobs, torch.zeros_like(ratios), advantages, mask, index, low, high)
    loss = aggregate(terms, mask, index, "sequence", tokens=int(mask.sum()), responses=len(rows))
    return loss.item(), torch.autograd.grad(loss, logprobs)[0].tolist()


@given(responses, bound, bound)
@settings(max_examples=80, deadline=None)
def test_sequence_clip_is_the_clip_of_each_responses_own_ratio(rows: Rows, low: float, high: float) -> None:
    loss, gradient = by_response(sequence_clip, rows, low, high)
    expected, slopes = 0.0, []
    for a, row in rows:
        own = [x for x, mine in row if mine]
        ratio = math.exp(sum(own) / len(own))
        assume(min(abs(ratio - 1 + low), abs(ratio - 1 - high)) > 1e-6)
        expected -= min(ratio * a, min(max(ratio, 1 - low), 1 + high) * a) / len(rows)
        free = ratio < 1 + high if a > 0 else ratio > 1 - low
        slopes += [-ratio * a / len(own) / len(rows) * (mine and free) for _, mine in row]
    assert loss == pytest.approx(expected, abs=1e-10)
    assert gradient == pytest.approx(slopes, abs=1e-10)


@given(responses, bound, bound)
@settings(max_examples=80, deadline=None)
def test_geometric_clip_is_the_geometric_mean_of_clipped_ratios(rows: Rows, low: float, high: float) -> None:
    loss, gradient = by_response(geometric_clip, rows, low, high)
    expected, slopes = 0.0, []
    for a, row in rows:
        assume(all(min(abs(x - high), abs(x + low)) > 1e-6 for x, _ in row))
        own = [min(x, high) if a > 0 else max(x, -low) for x, mine in row if mine]
        ratio = math.prod(math.exp(x) for x in own) ** (1 / len(own))
        expected -= ratio * a / len(rows)
        slopes += [-ratio * a / len(own) / len(rows) * (mine and (x < high if a > 0 else x > -low)) for x, mine in row]
    assert loss == pytest.approx(expected, abs=1e-10)
    assert gradient == pytest.approx(slopes, abs=1e-10)


@given(responses)
@settings(max_examples=40, deadline=None)
def test_response_sums_and_means_see_own_tokens_and_give_their_gradient_back(rows: Rows) -> None:
    ratios, _, mask, index = packed(rows)
    sums = [sum(x for x, mine in row if mine) for _, row in rows]
    counts = [sum(mine for _, mine in row) for _, row in rows]
    assert response_sum(ratios, mask, index).tolist() == pytest.approx([sums[i] for i in index], abs=1e-12)
    assert response_mean(ratios, mask, index).tolist() == pytest.approx([sums[i] / counts[i] for i in index], abs=1e-12)
    leaf, weight = ratios.clone().requires_grad_(), torch.arange(1.0, len(ratios) + 1).double()
    (gradient,) = torch.autograd.grad((response_mean(leaf, mask, index) * weight).sum(), leaf)
    expected = [float(weight[index == i].sum()) / counts[i] * bool(own) for i, own in zip(index.tolist(), mask, strict=True)]
    assert gradient.tolist() == pytest.approx(expected, abs=1e-12)


def test_a_response_without_own_tokens_has_sum_and_mean_zero() -> None:
    empty = column(3.0, 4.0), torch.tensor([False, False]), torch.tensor([0, 0])
    assert response_sum(*empty).tolist() == response_mean(*empty).tolist() == [0, 0]


@given(responses, st.sampled_from(["truncate", "mask"]), st.sampled_from(["token", "sequence"]), st.floats(0.2, 0.9), st.floats(1.1, 3))
@settings(max_examples=120, deadline=None)
def test_mismatch_weights_are_the_loops(
    rows: Rows, kind: Literal["truncate", "mask"], level: Literal["token", "sequence"], low: float, high: float
) -> None:
    ratios, _, mask, index = packed(rows)
    old = ratios.clone().requires_grad_()
    found = mismatch_weights(old, torch.zeros_like(ratios), mask, index, kind, level, low, high)
    assert not found.requires_grad
    expected = []
    for _, row in rows:
        whole = sum(x for x, mine in row if mine)
        for x, _ in row:
            weight = math.exp(x if level == "token" else whole)
            assume(min(abs(weight - low), abs(weight - high)) > 1e-9)
            expected.append(min(weight, high) if kind == "truncate" else weight if low <= weight <= high else 0.0)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_equal_sampler_and_trainer_have_weight_one() -> None:
    same, mask, index = column(-1, -2, -3), torch.tensor([True, False, True]), torch.tensor([0, 0, 1])
    for kind, level in (("truncate", "token"), ("truncate", "sequence"), ("mask", "token"), ("mask", "sequence")):
        assert mismatch_weights(same, same, mask, index, kind, level, 0.5, 2.0).tolist() == [1, 1, 1]
