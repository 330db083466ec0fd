"""Preference losses: the gradient each one states, and the identities that tie them together."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.maths import preference_losses as losses

number = st.floats(-15, 15)
positive = st.floats(0.02, 2)
smoothing = st.floats(0.01, 0.45)
fast = settings(max_examples=60, deadline=None)

Gradient = Callable[[float, float], tuple[float, float]]


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def slope(x: float) -> float:
    return s(x) * s(-x)


def of_margin(d: Callable[[float], float]) -> Gradient:
    """The gradient of a loss in h_w - h_l alone."""
    return lambda w, r: (d(w - r), -d(w - r))


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss(name: str, w: float, r: float, *settings: object) -> float:
    return float(getattr(losses, name)(column(w), column(r), *settings))


B, E = 0.7, 0.2
YES, NO = torch.tensor([True]), torch.tensor([False])


def discopop_slope(x: float, tau: float = 0.5) -> float:
    m = s(x / tau)
    return B * (m * (1 - m) / tau * (math.exp(-x) + math.log(s(x))) - (1 - m) * s(-x) - m * math.exp(-x))


def f_gradient(g: Callable[[float], float], dg: Callable[[float], float]) -> Gradient:
    def gradient(w: float, r: float) -> tuple[float, float]:
        p = s(-B * (g(w) - g(r)))
        return -B * p * dg(w), B * p * dg(r)

    return gradient


def odds_gradient(w: float, r: float) -> tuple[float, float]:
    p = s(-(w - math.log1p(-math.exp(w)) - r + math.log1p(-math.exp(r))))
    return -p / (1 - math.exp(w)), p / (1 - math.exp(r))


# function of losses it tests: (loss of (w, r), its gradient in closed form); names after a colon are further forms of one function
TABLE: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], Gradient]] = {
    "dpo": (lambda w, r: losses.dpo(w, r, B), of_margin(lambda d: -B * s(-B * d))),
    "dpo:conservative": (lambda w, r: losses.dpo(w, r, B, E), of_margin(lambda d: B * (s(B * d) - (1 - E)))),
    "robust_dpo": (
        lambda w, r: losses.robust_dpo(w, r, B, E), of_margin(lambda d: B * (-(1 - E) * s(-B * d) - E * s(B * d)) / (1 - 2 * E))
    ),
    "ipo": (lambda w, r: losses.ipo(w, r, 0.3), of_margin(lambda d: 2 * (d - 1 / 0.6))),
    "hinge": (lambda w, r: losses.hinge(w, r, B), of_margin(lambda d: -B if B * d < 1 else 0.0)),
    "kto": (
        lambda w, r: losses.kto(w, YES, column(0.4), B, 1.5, 0.5) + losses.kto(r, NO, column(0.4), B, 1.5, 0.5),
        lambda w, r: (-1.5 * B * slope(B * (w - 0.4)), 0.5 * B * slope(B * (r - 0.4))),
    ),
    "bco": (
        lambda w, r: losses.bco(w, YES, column(0.3), B) + losses.bco(r, NO, column(0.3), B),
        lambda w, r: (-B * s(0.3 - B * w), B * s(B * r - 0.3)),
    ),
    "bco_pair": (lambda w, r: losses.bco_pair(w, r, B), lambda w, r: (-B * s(-B * w), B * s(B * r))),
    "odds_ratio": (losses.odds_ratio, odds_gradient),
    "simpo": (lambda w, r: losses.simpo(w, r, B, 0.5), of_margin(lambda d: -B * s(0.5 - B * d))),
    "exo_pair": (lambda w, r: losses.exo_pair(w, r, B, E), of_margin(lambda d: B * slope(B * d) * (B * d - math.log((1 - E) / E)))),
    "nca_pair": (lambda w, r: losses.nca_pair(w, r, B), lambda w, r: (B * (1.5 * s(B * w) - 1), B * s(B * r) / 2)),
    "aot": (lambda w, r: losses.aot(w, r, B, E), of_margin(lambda d: B * (s(B * d) - (1 - E)))),
    "apo_zero": (lambda w, r: losses.apo_zero(w, r, B), lambda w, r: (-B * slope(B * w), B * slope(B * r))),
    "apo_down": (
        lambda w, r: losses.apo_down(w, r, B), lambda w, r: (B * (slope(B * w) - slope(B * (w - r))), B * slope(B * (w - r)))
    ),
    "discopop": (lambda w, r: losses.discopop(w, r, B, 0.5), of_margin(lambda d: discopop_slope(B * d))),
    "sppo_hard": (lambda w, r: losses.sppo_hard(w, r, B), lambda w, r: (2 * (w - 0.5 / B), 2 * (r + 0.5 / B))),
    "f_dpo:reverse": (lambda w, r: losses.f_dpo(w, r, B, "reverse_kl"), f_gradient(lambda h: h, lambda h: 1.0)),
    "f_dpo": (lambda w, r: losses.f_dpo(w, r, B, "forward_kl"), f_gradient(lambda h: -math.exp(-h), lambda h: math.exp(-h))),
    "f_dpo:js": (lambda w, r: losses.f_dpo(w, r, B, "jensen_shannon"), f_gradient(lambda h: math.log(s(h)), lambda h: s(-h))),
    "f_dpo:alpha": (
        lambda w, r: losses.f_dpo(w, r, B, "alpha", 0.4),
        f_gradient(lambda h: (1 - math.exp(-0.4 * h)) / 0.4, lambda h: math.exp(-0.4 * h)),
    ),
    "plackett_luce": (
        lambda w, r: losses.plackett_luce(torch.cat([w, r]), column(1, 0), torch.tensor([0, 0]), B).sum(),
        of_margin(lambda d: -B * s(-B * d)),
    ),
}  # fmt: skip


def test_every_loss_is_in_the_table() -> None:
    public = {name for name, f in vars(losses).items() if inspect.isfunction(f) and f.__module__ == losses.__name__ and name[0] != "_"}
    helpers = {"divergence_link", "wpo_weights", "desensitised_weights"}
    assert public - helpers == {name.partition(":")[0] for name in TABLE}


@pytest.mark.parametrize("name", TABLE)
@given(number, number)
@fast
def test_gradient_is_the_closed_form(name: str, w: float, r: float) -> None:
    if name == "odds_ratio":
        w, r = -abs(w) - 0.01, -abs(r) - 0.01  # mean log-probabilities
    function, gradient = TABLE[name]
    chosen, rejected = column(w).requires_grad_(), column(r).requires_grad_()
    if name == "hinge" and abs(B * (w - r) - 1) < 1e-9:
        return
    function(chosen, rejected).sum().backward()
    expected = gradient(w, r)
    assert float(chosen.grad) == pytest.approx(expected[0], rel=1e-9, abs=1e-12)
    assert float(rejected.grad) == pytest.approx(expected[1], rel=1e-9, abs=1e-12)


IN_MARGIN = {
    "dpo": (B,), "robust_dpo": (B, E), "ipo": (0.3,), "hinge": (B,), "simpo": (B, 0.5), "exo_pair": (B, E), "discopop": (B, 0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", IN_MARGIN)
@given(number, number, st.floats(-5, 5))
@fast
def test_a_loss_in_the_margin_does_not_see_a_common_shift(name: str, w: float, r: float, shift: float) -> None:
    assert loss(name, w + shift, r + shift, *IN_MARGIN[name]) == pytest.approx(loss(name, w, r, *IN_MARGIN[name]), rel=1e-8, abs=1e-10)


FALLING = {"dpo": (B,), "robust_dpo": (B, E), "hinge": (B,), "simpo": (B, 0.5), "bco_pair": (B,), "apo_zero": (B,), "odds_ratio": ()}


@pytest.mark.parametrize("name", FALLING)
@given(number, number, st.floats(0.01, 3))
@fast
def test_a_larger_margin_never_costs_more(name: str, w: float, r: float, more: float) -> None:
    if name == "odds_ratio":
        w, r = -abs(w) - 4, -abs(r) - 4
    assert loss(name, w + more, r, *FALLING[name]) <= loss(name, w, r, *FALLING[name])
    assert loss(name, w, r - more, *FALLING[name]) <= loss(name, w, r, *FALLING[name])


@given(number, number, positive, smoothing)
@fast
def test_conservative_dpo_is_the_mean_over_flips_and_robust_dpo_undoes_them(w: float, r: float, beta: float, e: float) -> None:
    plain, flipped = loss("dpo", w, r, beta), loss("dpo", r, w, beta)
    assert loss("dpo", w, r, beta, e) == pytest.approx((1 - e) * plain + e * flipped)
    assert loss("dpo", r, w, beta, 1 - e) == pytest.approx(loss("dpo", w, r, beta, e))
    robust = (1 - e) * loss("robust_dpo", w, r, beta, e) + e * loss("robust_dpo", r, w, beta, e)
    assert robust == pytest.approx(plain, rel=1e-8, abs=1e-9)


@given(number, number)
@fast
def test_limits_of_beta(w: float, r: float) -> None:
    assert loss("dpo", w, r, 1e-12) == pytest.approx(math.log(2), abs=1e-9)
    assert loss("hinge", w, r, 1e-12) == pytest.approx(1, abs=1e-9)
    if abs(w - r) > 0.01:  # scaled by beta, DPO becomes the size of a wrong margin
        assert loss("dpo", w, r, 1e6) / 1e6 == pytest.approx(max(0.0, r - w), abs=1e-4)
    assert loss("ipo", w, r, 1e12) == pytest.approx((w - r) ** 2, abs=1e-6)


@given(positive)
@fast
def test_ipo_is_least_at_one_over_two_tau(tau: float) -> None:
    best = 1 / (2 * tau)
    assert loss("ipo", best, 0.0, tau) == 0
    assert loss("ipo", best + 0.1, 0.0, tau) == pytest.approx(0.01)
    assert loss("ipo", best - 0.1, 0.0, tau) == pytest.approx(0.01)


@given(positive, smoothing)
@fast
def test_exo_is_zero_exactly_where_the_policy_chooses_as_the_label_does(beta: float, e: float) -> None:
    best = math.log((1 - e) / e) / beta
    assert loss("exo_pair", best, 0.0, beta, e) == pytest.approx(0, abs=1e-12)
    assert loss("exo_pair", best + 1, 0.0, beta, e) > 0
    assert loss("exo_pair", best - 1, 0.0, beta, e) > 0


@pytest.mark.parametrize("e", [0.0, 1.0, -0.1])
def test_exo_needs_uncertain_labels(e: float) -> None:
    with pytest.raises(ValueError, match="finite only between 0 and 1"):
        loss("exo_pair", 1.0, 0.0, 0.1, e)


@given(number, number, positive)
@fast
def test_f_dpo_contains_dpo_and_its_limits(w: float, r: float, beta: float) -> None:
    plain = loss("dpo", w, r, beta)
    assert loss("f_dpo", w, r, beta, "reverse_kl") == pytest.approx(plain)
    assert loss("f_dpo", w, r, beta, "alpha", 1e-9) == pytest.approx(plain, rel=1e-5, abs=1e-5)
    assert loss("f_dpo", w, r, beta, "alpha", 1.0) == pytest.approx(loss("f_dpo", w, r, beta, "forward_kl"), rel=1e-6, abs=1e-9)


@given(number, number, positive)
@fast
def test_jensen_shannon_lies_between_the_two_kls(w: float, r: float, beta: float) -> None:
    low, high = w - 40, r - 40  # pi far below the reference: g(h) = log s(h) is h there
    assert loss("f_dpo", low, high, beta, "jensen_shannon") == pytest.approx(loss("dpo", low, high, beta), rel=1e-6, abs=1e-9)
    low, high = w + 40, r + 40  # far above, it is bounded, as forward KL's is
    assert loss("f_dpo", low, high, beta, "jensen_shannon") == pytest.approx(math.log(2), abs=1e-6)


@given(number, number, number, positive)
@fast
def test_plackett_luce_is_the_product_of_choices_and_of_two_is_dpo(a: float, b: float, c: float, beta: float) -> None:
    one = torch.zeros(3, dtype=torch.long)
    terms = losses.plackett_luce(column(a, b, c), column(2, 1, 0), one, beta)
    first = math.log(sum(math.exp(beta * (x - a)) for x in (a, b, c)))
    assert terms.tolist() == pytest.approx([first, loss("dpo", b, c, beta), 0], abs=1e-9)
    two = losses.plackett_luce(column(b, a, c), column(0, 1, 0), torch.tensor([0, 0, 1]), beta)  # another prompt's does not compete
    assert float(two.sum()) == pytest.approx(loss("dpo", a, b, beta), abs=1e-9)


def test_plackett_luce_probabilities_of_all_rankings_add_up_to_one() -> None:
    from itertools import permutations

    h, one = column(0.3, -1.0, 2.0, 0.1), torch.zeros(4, dtype=torch.long)
    total = sum(math.exp(-float(losses.plackett_luce(h, column(*scores), one, 0.8).sum())) for scores in permutations(range(4)))
    assert total == pytest.approx(1)


def test_tied_responses_never_compete() -> None:
    one = torch.zeros(3, dtype=torch.long)
    terms = losses.plackett_luce(column(0.5, -0.2, 1.0), column(1, 1, 0), one, 1.0)
    assert terms.tolist() == pytest.approx([loss("dpo", 0.5, 1.0, 1.0), loss("dpo", -0.2, 1.0, 1.0), 0])


@given(number, number, positive, st.floats(0, 0.45))
@fast
def test_optimal_transport_of_one_pair_is_conservative_dpo(w: float, r: float, beta: float, e: float) -> None:
    assert loss("aot", w, r, beta, e) == pytest.approx(loss("dpo", w, r, beta, e))


@given(st.lists(number, min_size=1, max_size=5), st.lists(number, min_size=1, max_size=5), positive)
@fast
def test_optimal_transport_sees_distributions_alone(upper: list[float], lower: list[float], beta: float) -> None:
    value = float(losses.aot(column(*upper), column(*lower), beta).mean())
    assert float(losses.aot(column(*upper[::-1]), column(*sorted(lower)), beta).mean()) == pytest.approx(value)
    assert float(losses.aot(column(*upper, *upper), column(*lower, *lower, *lower), beta).mean()) == pytest.approx(value)
    if len(upper) == len(lower):
        pairs = zip(sorted(upper), sorted(lower), strict=True)
        assert value == pytest.approx(sum(loss("dpo", w, x, beta) for w, x in pairs) / len(upper))


@given(number, positive)
@fast
def test_kto_and_bco_are_flat_at_their_baseline_for_all_alike(baseline: float, beta: float) -> None:
    for desirable in (YES, NO):
        h = column(baseline)
        assert float(losses.kto(h, desirable, h, beta)) == pytest.approx(0.5)
        assert float(losses.bco(h, desirable, beta * h, beta)) == pytest.approx(math.log(2))
    assert float(losses.kto(h + 1, YES, h, beta)) == pytest.approx(float(losses.kto(h - 1, NO, h, beta)))


@given(number, number, positive)
@fast
def test_pairs_of_unpaired_losses(w: float, r: float, beta: float) -> None:
    zero = column(0.0)
    apart = losses.bco(column(w), YES, zero, beta) + losses.bco(column(r), NO, zero, beta)
    assert loss("bco_pair", w, r, beta) == pytest.approx(float(apart))
    apart = losses.kto(column(w), YES, zero, beta) + losses.kto(column(r), NO, zero, beta)
    assert loss("apo_zero", w, r, beta) == pytest.approx(float(apart))  # APO-zero is KTO with the baseline at 0


def test_at_the_reference_every_pair_costs_a_coin_toss() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert losses.dpo(zero, zero, 0.1).tolist() == pytest.approx([math.log(2)] * 3)


def test_discopop_stays_finite_far_out() -> None:
    assert math.isfinite(loss("discopop", -2000.0, 2000.0, 1.0, 0.05))
    assert loss("discopop", 2000.0, -2000.0, 1.0, 0.05) == 0


def test_certain_tokens_have_finite_odds() -> None:
    chosen = column(0.0).requires_grad_()
    losses.odds_ratio(chosen, column(-1.0)).backward()
    assert math.isfinite(float(chosen.grad))


def test_weights_of_tokens_and_pairs() -> None:
    position, public = torch.tensor([0, 1, 2, 0, 1]), torch.tensor([2, 2, 2, 2, 2])
    assert losses.desensitised_weights(position, public, 0.3).tolist() == pytest.approx([1, 1, 0.3, 1, 1])
    assert losses.wpo_weights(column(math.log(0.5)), column(math.log(0.2))).tolist() == pytest.approx([0.1])
