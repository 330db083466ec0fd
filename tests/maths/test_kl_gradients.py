"""Which gradient each placement of each KL estimator has, by exact expectations over a space where every response is listed.

The policies are those of a published table of these errors (the figures asserted below): 121 responses of up to 4 tokens over
4 words, 40 prefixes with free logits, N(0, 1) for both policies. Everything goes through the algorithm's own credit, surrogate and
penalty; only the expectation is written here.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from trimtab.algorithms.base import Estimator, KLConfig
from trimtab.algorithms.reinforce import REINFORCE
from trimtab.batch import Batch, Outputs
from trimtab.exact.task import Task
from trimtab.maths.full_kl import full_kl
from trimtab.maths.kl import k1, k2, k3
from trimtab.maths.logprobs import Head
from trimtab.maths.policy_losses import Level

TASK = Task("table", vocabulary=4, length=4, prompts=("a",), rewards="random")
SPACE = Batch(TASK.groups)
HEAD = Head(torch.eye(4, dtype=torch.float64))

LOSS, SEQUENCE, WEIGHTED = {"place": "loss"}, {"level": "sequence"}, {"ratio_weighted": True}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "k1 in the reward": {"estimator": "k1"},
    "k2 in the reward": {"estimator": "k2"},
    "k3 in the reward": {"estimator": "k3"},
    "full in the reward": {"estimator": "full"},
    **{f"{k} of the response": {**LOSS, **SEQUENCE, "estimator": k} for k in ("k1", "k2", "k3", "k1+", "k3+")},
    **{f"{k} of the token": {**LOSS, "estimator": k} for k in ("k1", "k2", "k3", "k1+", "k3+", "full", "rao-blackwell")},
}


@cache
def cells() -> tuple[Tensor, Tensor]:
    """For every token of every response: the number of its prefix, and the token."""
    rows = [(r.tokens[:t], token) for r in TASK.responses for t, token in enumerate(r.tokens)]
    prefixes = sorted({prefix for prefix, _ in rows}, key=lambda prefix: (len(prefix), prefix))
    assert (len(TASK.responses), len(prefixes)) == (121, 40)
    return torch.tensor([prefixes.index(prefix) for prefix, _ in rows]), torch.tensor([token for _, token in rows])


@cache
def table() -> tuple[Tensor, Tensor]:
    """Logits of the policy and of the reference [prefixes, words]."""
    generator = np.random.default_rng(0)
    reference = generator.standard_normal((40, 4))
    generator.standard_normal(121)  # rewards, which play no part here
    return torch.from_numpy(generator.standard_normal((40, 4))), torch.from_numpy(reference)


def token_logprobs(logits: Tensor) -> Tensor:
    prefix, token = cells()
    return torch.log_softmax(logits, -1)[prefix, token]


def response_logprobs(logits: Tensor) -> Tensor:
    return SPACE.sum_by_response(token_logprobs(logits))


def prefix_kl(logits: Tensor, reference: Tensor) -> Tensor:
    prefix, _ = cells()
    return full_kl(logits[prefix], HEAD, reference[prefix], HEAD)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over whole responses, by its definition."""
    return (response_logprobs(p).exp() * (response_logprobs(p) - response_logprobs(q))).sum()


def reverse_and_forward(policy: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The exact gradients of KL(pi || ref) and of KL(ref || pi) for the policy's logits."""
    leaf = policy.clone().requires_grad_()
    return torch.autograd.grad(kl(leaf, reference), leaf)[0], torch.autograd.grad(kl(reference, leaf), leaf)[0]


def per_response(leaf: Tensor, sampler: Tensor, reference: Tensor, settings: dict[str, Any], baseline: str = "none") -> Tensor:
    """The loss of every response, of samples from `sampler`, when there is nothing but the penalty with beta = 1."""
    old = {"logprobs_old": token_logprobs(sampler), "full_kl": prefix_kl(sampler, reference)}
    batch = SPACE.with_tokens(**old, logprobs_ref=token_logprobs(reference))
    batch = batch.with_responses(reward=torch.zeros(len(SPACE.lengths), dtype=torch.float64))
    algorithm = REINFORCE(REINFORCE.Config(kl=KLConfig(beta=1.0, **settings), baseline=baseline))
    batch = algorithm.credit(batch)
    logprobs = token_logprobs(leaf)
    terms, _ = algorithm.surrogate(logprobs, batch)
    return batch.sum_by_response(terms + algorithm.penalty.loss(Outputs(logprobs=logprobs, full_kl=prefix_kl(leaf, reference)), batch))


def gradient(settings: dict[str, Any], policy: Tensor, reference: Tensor, sampler: Tensor | None = None) -> Tensor:
    """The exact expectation of the gradient over samples from the sampler (the policy itself unless given)."""
    sampler, leaf = policy if sampler is None else sampler, policy.clone().requires_grad_()
    loss = (response_logprobs(sampler).exp() * per_response(leaf, sampler, reference, settings)).sum()
    return torch.autograd.grad(loss, leaf)[0]


def error(found: Tensor, right: Tensor) -> float:
    """Relative error."""
    return float((found - right).norm() / right.norm())


def cosine(found: Tensor, right: Tensor) -> float:
    return float((found * right).sum() / (found.norm() * right.norm()))


def test_the_tables_policy_is_the_one_it_was_made_with() -> None:
    policy, reference = table()
    p, q = response_logprobs(policy), response_logprobs(reference)
    assert float(p.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert kl(policy, reference).item() == pytest.approx(0.838, abs=5e-4)
    spreads = []
    for estimate in (k1, k2, k3):
        values = estimate(p, q)
        spreads.append(float((p.exp() * (values - (p.exp() * values).sum()).square()).sum().sqrt()))
    assert spreads == pytest.approx([1.16, 1.51, 7.37], abs=5e-3)  # k3 does not always vary least


@pytest.mark.parametrize("what", ["k1 in the reward", "k2 of the response", "k1+ of the response", "k3+ of the response"])
def test_placements_with_the_gradient_of_the_kl(what: str) -> None:
    right, _ = reverse_and_forward(*table())
    assert error(gradient(PLACEMENTS[what], *table()), right) < 1e-12


def test_rao_blackwell_has_the_gradient_of_the_kl() -> None:
    right, _ = reverse_and_forward(*table())
    assert float((gradient(PLACEMENTS["rao-blackwell of the token"], *table()) - right).abs().max()) < 1e-12


@pytest.mark.parametrize("what", ["k1 of the response", "k1 of the token"])
def test_k1_as_a_loss_is_no_penalty_at_all(what: str) -> None:
    assert float(gradient(PLACEMENTS[what], *table()).abs().max()) < 1e-15


def test_k3_of_the_response_as_a_loss_has_the_gradient_of_the_other_direction() -> None:
    right, other = reverse_and_forward(*table())
    found = gradient(PLACEMENTS["k3 of the response"], *table())
    assert error(found, other) < 1e-12
    assert (error(found, right), cosine(found, right)) == pytest.approx((0.85, 0.58), abs=5e-3)


@pytest.mark.parametrize(
    ("what", "size", "angle"),
    [
        ("k2 of the token", 0.58, 0.82),
        ("k1+ of the token", 0.58, 0.82),
        ("k3+ of the token", 0.58, 0.82),
        ("full of the token", 0.58, 0.82),
        ("k3 of the token", 0.75, 0.68),
    ],
)
def test_penalties_per_token_as_a_loss_miss_later_kl(what: str, size: float, angle: float) -> None:
    right, _ = reverse_and_forward(*table())
    found = gradient(PLACEMENTS[what], *table())
    assert (error(found, right), cosine(found, right)) == pytest.approx((size, angle), abs=5e-3)


def test_the_full_kl_is_the_expectation_of_k1_over_the_next_token() -> None:
    """So k2 per token and the full KL, as losses, have the same expected gradient; only their variance differs."""
    policy, reference = table()
    log_p, log_q = torch.log_softmax(policy, -1), torch.log_softmax(reference, -1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[cells()[0]]
    assert torch.allclose(prefix_kl(policy, reference), expected, atol=1e-14)
    pair = [gradient(PLACEMENTS[f"{what} of the token"], policy, reference) for what in ("k2", "full")]
    assert float((pair[0] - pair[1]).abs().max()) < 1e-14


@pytest.mark.parametrize(("estimate", "size"), [(k2, 0.53), (k3, 0.84)])
def test_k2_and_k3_of_the_response_in_the_reward(estimate: Any, size: float) -> None:
    policy, reference = table()
    right, other = reverse_and_forward(policy, reference)
    leaf = policy.clone().requires_grad_()
    p = response_logprobs(leaf)
    penalty = estimate(p, response_logprobs(reference)).detach()
    (found,) = torch.autograd.grad((p.detach().exp() * penalty * p).sum(), leaf)
    assert error(found, right) == pytest.approx(size, abs=5e-3)
    if estimate is k3:
        assert error(found, right - other) < 1e-12


@pytest.mark.parametrize("what", ["k2", "k3"])
def test_k2_and_k3_of_the_token_in_the_reward_are_biased(what: str) -> None:
    right, _ = reverse_and_forward(*table())
    assert error(gradient(PLACEMENTS[f"{what} in the reward"], *table()), right) > 0.1


def test_the_full_kl_in_the_reward_sees_later_kl_only() -> None:
    """A token cannot change the KL of the prefix it was drawn from: in the reward is missing just what the loss would give."""
    right, _ = reverse_and_forward(*table())
    found = gradient(PLACEMENTS["full in the reward"], *table())
    assert error(found, right - gradient(PLACEMENTS["full of the token"], *table())) < 1e-12
    assert error(found, right) > 0.5


def test_k3_in_the_reward_lacks_just_what_k3_per_token_as_a_loss_gives() -> None:
    right, _ = reverse_and_forward(*table())
    found = gradient(PLACEMENTS["k3 in the reward"], *table())
    assert error(found, right - gradient(PLACEMENTS["k3 of the token"], *table())) < 1e-12


def spread(settings: dict[str, Any], baseline: str = "none") -> tuple[Tensor, float]:
    """The mean and the trace of the covariance of one response's gradient, y ~ pi."""
    policy, reference = table()
    leaf = policy.clone().requires_grad_()
    losses = per_response(leaf, policy, reference, settings, baseline)
    rows = torch.stack([torch.autograd.grad(loss, leaf, retain_graph=True)[0].flatten() for loss in losses])
    weight = response_logprobs(policy).exp()[:, None]
    mean = (weight * rows).sum(0)
    return mean, float((weight * (rows - mean).square()).sum())


def test_rao_blackwell_varies_least_of_the_right_ones() -> None:
    least_mean, least = spread(PLACEMENTS["rao-blackwell of the token"])
    for what in ("k1 in the reward", "k2 of the response"):
        mean, other = spread(PLACEMENTS[what])
        assert torch.allclose(mean, least_mean, atol=1e-12)
        assert other > 1.2 * least, what


def elsewhere(scale: float = 0.5) -> Tensor:
    """A sampler that is not the policy."""
    return table()[0] + scale * torch.from_numpy(np.random.default_rng(1).standard_normal((40, 4)))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_weighted_by_the_ratio_a_whole_responses_penalty_is_right_off_policy(estimator: str) -> None:
    policy, reference = table()
    right, _ = reverse_and_forward(policy, reference)
    settings = {**LOSS, **SEQUENCE, "estimator": estimator}
    assert error(gradient({**settings, **WEIGHTED}, policy, reference, elsewhere()), right) < 1e-10
    assert error(gradient(settings, policy, reference, elsewhere()), right) > 0.1


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_weighting_each_token_by_its_own_ratio_is_not_enough(estimator: str) -> None:
    policy, reference = table()
    right, _ = reverse_and_forward(policy, reference)
    settings = {**LOSS, **WEIGHTED, "estimator": estimator}
    assert error(gradient(settings, policy, reference, elsewhere()), right) > 0.1
    on_policy = gradient(settings, policy, reference)
    assert error(on_policy, gradient(PLACEMENTS["full of the token"], policy, reference)) < 1e-12  # it misses later KL and no more


def near(distance: float) -> Tensor:
    """A policy at a small distance from the reference."""
    return table()[1] + distance * torch.from_numpy(np.random.default_rng(2).standard_normal((40, 4)))


@pytest.mark.parametrize(
    "what", ["k2 of the token", "k3 of the token", "k3 of the response", "full of the token", "k1+ of the token", "k3+ of the token"]
)
def test_near_the_reference_loss_placed_penalties_become_right(what: str) -> None:
    errors = []
    for distance in (1e-2, 1e-3):
        right, _ = reverse_and_forward(near(distance), table()[1])
        errors.append(error(gradient(PLACEMENTS[what], near(distance), table()[1]), right))
    assert errors[0] < 0.05
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.2)  # first order in the distance


@pytest.mark.parametrize("what", ["k1 of the token", "k1 of the response", "k2 in the reward", "k3 in the reward", "full in the reward"])
def test_near_the_reference_all_but_k1_vanish_in_the_reward_like_k1_as_a_loss(what: str) -> None:
    for distance in (1e-2, 1e-3):
        right, _ = reverse_and_forward(near(distance), table()[1])
        found = gradient(PLACEMENTS[what], near(distance), table()[1])
        assert error(found, right) == pytest.approx(1, abs=3 * distance)
        assert float(found.norm()) < 3 * distance * float(right.norm())


def test_every_placement_that_the_settings_allow_is_in_the_table() -> None:
    allowed = 0
    for place, estimator, level in product(("reward", "loss"), get_args(Estimator), get_args(Level)):
        try:
            KLConfig(place=place, estimator=estimator, level=level)
        except ValidationError:
            continue
        allowed += 1
    assert allowed == len(PLACEMENTS)
