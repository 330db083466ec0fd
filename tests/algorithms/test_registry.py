"""What every policy algorithm in the registry must hold: one that is added is tested by being registered."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import tiny
from trimtab.algorithms import ALGORITHMS
from trimtab.algorithms.base import Estimator, KLConfig
from trimtab.algorithms.group import GroupRelative
from trimtab.algorithms.reinforce import RLOO
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.data.templates import Template
from trimtab.maths.policy_losses import Level, mismatch_weights
from trimtab.maths.reductions import Aggregation, aggregate
from trimtab.models.language import LanguageModel
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.training.update import update
from trimtab.types import Group, Prompt, Response

names = pytest.mark.parametrize("name", ALGORITHMS)
LONGEST = 6


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name: str, **settings: Any) -> Any:
    """An algorithm with settings of its own."""
    kind = ALGORITHMS[name].load()
    return kind(kind.Config(length=LONGEST, **settings))


def placements() -> dict[str, dict[str, Any]]:
    """Every KL placement, estimator, level and weighting that the configuration allows."""
    found = {}
    choices = product(("reward", "loss"), get_args(Estimator), get_args(Level), (False, True))
    for place, estimator, level, weighted in choices:
        settings = {"beta": 0.3, "place": place, "estimator": estimator, "level": level, "ratio_weighted": weighted}
        if weighted and place == "reward":
            continue  # it has no say there
        try:
            KLConfig(**settings)
        except ValidationError:
            continue
        found[f"{estimator} of the {level} in the {place}{', weighted' * weighted}"] = settings
    return found


MISMATCHES = [{}, *({"kind": k, "level": v, "low": 0.8, "high": 1.1} for k, v in product(("truncate", "mask"), get_args(Level)))]


def mixed() -> dict[str, dict[str, Any]]:
    """Every KL placement, with the other settings mixed into it."""
    aggregations, found = get_args(Aggregation), {}
    for i, (what, kl) in enumerate({"no kl": {"beta": 0.0}, **placements()}.items()):
        others = {"aggregation": aggregations[i % 3], "mismatch": MISMATCHES[i % 5], "mask_truncated": i % 4 == 3}
        found[what] = {"kl": kl, "entropy_weight": 0.1 * (i % 2), **others}
    return found


ALONE: dict[str, dict[str, Any]] = {
    **{f"aggregation {how}": {"aggregation": how} for how in get_args(Aggregation)},
    **{f"mismatch {m['kind']} {m['level']}": {"mismatch": m} for m in MISMATCHES[1:]},
    "entropy bonus": {"entropy_weight": 0.1},
    "truncated left out": {"mask_truncated": True},
}
VARIANTS = ALONE | mixed()


@cache
def policy(seed: int) -> LanguageModel:
    """A tiny policy with a value head: different seeds are different, but not far from each other.

    GPT-2, because all of it computes in float64 (the RMSNorm of Llama and others rounds to float32 in between).
    """
    shape = {"vocab_size": 12, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = LanguageModel(tiny.model("gpt2", torch.float64, **shape), Template.of(tiny.tokenizer()))
    head = model.add_value_head()
    with torch.no_grad():
        for parameter in (*model.model.parameters(), *head.parameters()):
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=seeded(seed))
    return model


def groups() -> tuple[Group, ...]:
    """Eight prompts with two to four responses of one to six tokens; some cut off, some with tokens that are not the policy's own."""
    generator = seeded(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def response(number: int) -> Response:
        tokens = tuple(draw(1, 12) for _ in range(draw(1, LONGEST + 1)))
        mask = tuple(place != 1 for place in range(len(tokens))) if number % 3 == 0 else None
        return Response(tokens, "", truncated=number % 4 == 1, mask=mask)

    return tuple(
        Group(Prompt(tuple(draw(1, 12) for _ in range(draw(2, 5))), ""), tuple(response(4 * i + j) for j in range(draw(2, 5))))
        for i in range(8)
    )


def forward(model: LanguageModel, batch: Batch, entropy: bool = True, full_kl: bool = True) -> Outputs:
    """Log-probabilities and values, entropies and the full KL to the reference policy."""
    if not full_kl:
        return model.forward(batch, entropy=entropy)
    with torch.no_grad():
        states, _ = policy(2).predictors(batch)
    return model.forward(batch, entropy=entropy, reference=(states, policy(2).head))


@cache
def rollout() -> Batch:
    """A batch as policy learning looks at it, by an old policy that is not the present one."""
    batch = Batch(groups())
    with torch.no_grad():
        old, reference = forward(policy(1), batch), policy(2).forward(batch)
    assert old.logprobs is not None
    columns = {"logprobs_old": old.logprobs, "values_old": old.values, "entropy": old.entropy, "full_kl": old.full_kl}
    noise = 0.2 * torch.randn(len(old.logprobs), dtype=torch.float64, generator=seeded(3))
    columns |= {"logprobs_ref": reference.logprobs, "logprobs_sampler": old.logprobs + noise}
    reward, baseline = torch.randn(2, len(batch.lengths), dtype=torch.float64, generator=seeded(4))
    return batch.with_tokens(**columns).with_responses(score=reward, reward=reward, baseline=baseline)  # type: ignore[arg-type]


def loss_of(algorithm: Any, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
    """Policy and value loss together, as on a shared trunk."""
    loss: Loss = algorithm.policy_loss(outputs, batch, counts)
    if not algorithm.uses_critic:
        return loss
    return replace(loss, value=loss.value + 0.1 * algorithm.value_loss(outputs, batch, counts).value)


def alone(batch: Batch) -> Batch:
    """Every response in a group of its own: its prompt is read again for each."""
    return Batch(tuple(group.only([i]) for group in batch.groups for i in range(len(group.responses))))


def learn(algorithm: Any, batch: Batch, token_budget: int, *, repeat_prompts: bool = False) -> tuple[dict[str, float], Tensor]:
    """Metrics and weights after one optimiser step of the present policy."""
    model = policy(0)
    assert model.value_head is not None
    parameters = {**model.trainable(), **{f"value_head.{n}": p for n, p in model.value_head.named_parameters()}}
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimiser = Optimiser(parameters, OptimConfig(lr=1e-2, schedule="constant", max_grad_norm=1e6, eps=1e-3), 1)
    needs = algorithm.config.entropy_weight > 0, algorithm.config.kl.needs_full

    def read(micro: Batch) -> Outputs:
        return forward(model, alone(micro) if repeat_prompts else micro, *needs)

    metrics = update(batch, read, lambda *given: loss_of(algorithm, *given), [optimiser], at=0, token_budget=token_budget)
    moved = torch.cat([p.detach().flatten().clone() for p in parameters.values()])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    return metrics, moved


@names
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_update_does_not_depend_on_how_the_batch_is_cut_ordered_and_read(name: str, variant: str) -> None:
    algorithm = make(name, **VARIANTS[variant])
    batch = algorithm.credit(rollout())
    metrics, weights = learn(algorithm, batch, 10_000)
    other, budget = batch.select([5, 2, 7, 0, 1, 6, 4, 3]), 1 if variant in ALONE else 90
    assert len(other.micro_batches(budget)) == (8 if variant in ALONE else 2)
    other_metrics, other_weights = learn(algorithm, other, budget, repeat_prompts=True)
    assert float((weights - other_weights).abs().max()) < 1e-9
    assert other_metrics == pytest.approx(metrics, abs=1e-9)


@names
def test_an_update_does_not_depend_on_where_a_group_is_cut(name: str) -> None:
    algorithm = make(name)
    batch = replace(algorithm.credit(rollout()), apart=True)
    metrics, weights = learn(algorithm, batch, 10_000)
    for budget in (1, max(group.token_count for group in batch.groups) - 1):
        assert len(batch.micro_batches(budget)) > len(replace(batch, apart=False).micro_batches(budget))
        other_metrics, other_weights = learn(algorithm, batch, budget)
        assert float((weights - other_weights).abs().max()) < 1e-9
        assert other_metrics == pytest.approx(metrics, abs=1e-9)


def spoilt(column: Tensor, mask: Tensor) -> Tensor:
    """The column with other finite values at masked tokens."""
    other = column + 3 * torch.randn(column.shape, dtype=column.dtype, generator=seeded(7))
    return torch.where(mask, column, other)


def gradients(algorithm: Any, columns: Mapping[str, Tensor], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and its gradient with respect to everything the model says."""
    leaves = {name: column.detach().clone().requires_grad_() for name, column in columns.items()}
    loss = loss_of(algorithm, Outputs(**leaves), batch, Counts.of(batch)).value
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return loss.detach(), {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}


def said() -> dict[str, Tensor]:
    with torch.no_grad():
        outputs = forward(policy(0), rollout())
    return {name: getattr(outputs, name) for name in ("logprobs", "entropy", "values", "full_kl")}


@names
def test_what_a_masked_token_holds_changes_nothing_bit_for_bit(name: str) -> None:
    columns = said()
    for variant, settings in VARIANTS.items():
        algorithm = make(name, **settings)
        clean = algorithm.credit(rollout())
        mask = clean.mask
        assert not mask.all()
        loss, grads = gradients(algorithm, columns, clean)
        dirty = clean.with_tokens(**{column: spoilt(x, mask) for column, x in clean.tokens.items()})
        other, other_grads = gradients(algorithm, {n: spoilt(x, mask) for n, x in columns.items()}, dirty)
        assert torch.equal(loss, other), variant
        for what, grad in grads.items():
            assert torch.equal(grad, other_grads[what]), (variant, what)
            assert not grad[~mask].any(), (variant, what)


@names
def test_credit_does_not_see_the_penalty_of_a_masked_token(name: str) -> None:
    batch = rollout()
    policies = ("logprobs_old", "logprobs_ref", "logprobs_sampler", "full_kl")
    dirty = batch.with_tokens(**{column: spoilt(batch.tokens[column], batch.mask) for column in policies})
    for variant, settings in VARIANTS.items():
        clean, other = (make(name, **settings).credit(b).tokens["advantages"] for b in (batch, dirty))
        assert torch.equal(clean, other), variant


@names
@pytest.mark.parametrize("how", get_args(Aggregation))
def test_at_the_old_policy_the_gradient_is_the_policy_gradient_and_every_ratio_one(name: str, how: Aggregation) -> None:
    algorithm = make(name, aggregation=how)
    batch = algorithm.credit(rollout())
    counts, leaf = Counts.of(batch), batch.tokens["logprobs_old"].clone().requires_grad_()
    loss = algorithm.policy_loss(Outputs(logprobs=leaf), batch, counts)
    (found,) = torch.autograd.grad(loss.value, leaf)
    sizes = {"tokens": counts.tokens, "responses": counts.responses, "length": LONGEST}
    plain = aggregate(-batch.tokens["advantages"] * leaf, batch.mask, batch.response_of_token, how, **sizes)
    (expected,) = torch.autograd.grad(plain, leaf)
    assert float(expected.abs().max()) > 1e-3
    assert float((found - expected).abs().max()) < 1e-9
    assert float(loss.maxima["ratio_max"]) == float(loss.maxima["ratio_inverse_max"]) == 1.0
    assert float(loss.means["approx_kl"]) == 0.0
    assert float(loss.means.get("clip_fraction", torch.zeros(()))) == 0.0


@names
@pytest.mark.parametrize("mismatch", MISMATCHES[1:], ids=lambda m: f"{m['kind']} {m['level']}")
def test_a_mismatch_weight_multiplies_the_surrogate_and_nothing_else(name: str, mismatch: dict[str, Any]) -> None:
    kl = {"beta": 0.3, "place": "loss", "estimator": "k2"}
    algorithm = make(name, kl=kl, aggregation="token", mismatch=mismatch)
    batch = algorithm.credit(rollout())
    counts, old, mask = Counts.of(batch), batch.tokens["logprobs_old"], batch.mask
    weights = mismatch_weights(old, batch.tokens["logprobs_sampler"], mask, batch.response_of_token, *mismatch.values())
    assert float((weights - 1).abs().max()) > 0.1
    leaf = said()["logprobs"].requires_grad_()
    penalty = 0.15 * (leaf - batch.tokens["logprobs_ref"]).square()
    expected = (weights * algorithm.surrogate(leaf, batch)[0] + penalty)[mask].sum() / counts.tokens
    loss = algorithm.policy_loss(Outputs(logprobs=leaf), batch, counts)
    assert loss.value.item() == pytest.approx(expected.item(), abs=1e-12)
    assert torch.allclose(*(torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss.value, expected)), atol=1e-12)
    assert float(loss.means["mismatch_weight"]) == pytest.approx(float(weights[mask].mean()), abs=1e-12)


@names
@pytest.mark.parametrize("how", get_args(Aggregation))
def test_an_entropy_bonus_raises_entropy_by_its_weight(name: str, how: Aggregation) -> None:
    algorithm = make(name, aggregation=how, entropy_weight=0.25)
    batch = algorithm.credit(rollout())
    counts, entropy = Counts.of(batch), batch.tokens["entropy"].clone().requires_grad_()
    loss = algorithm.policy_loss(Outputs(logprobs=batch.tokens["logprobs_old"], entropy=entropy), batch, counts)
    sizes = {"tokens": counts.tokens, "responses": counts.responses, "length": LONGEST}
    bonus = aggregate(0.25 * entropy, batch.mask, batch.response_of_token, how, **sizes)
    assert torch.equal(*(torch.autograd.grad(x, entropy)[0] for x in (-loss.value, bonus)))
    assert float(loss.means["entropy"]) == pytest.approx(float(batch.tokens["entropy"][batch.mask].mean()), abs=1e-12)


@names
@pytest.mark.parametrize("discount", [1.0, 0.7])
def test_credit_is_linear_before_it_is_scaled(name: str, discount: float) -> None:
    algorithm, batch = make(name, discount=discount), rollout()
    r1, r2, v1, v2 = torch.randn(4, sum(batch.lengths), dtype=torch.float64, generator=seeded(5))
    a, b = 1.7, -0.4
    whole = algorithm.assign(batch, a * r1 + b * r2, a * v1 + b * v2)
    parts = a * algorithm.assign(batch, r1, v1) + b * algorithm.assign(batch, r2, v2)
    assert float(whole.abs().max()) > 0.1
    assert torch.allclose(whole, parts, atol=1e-12, rtol=0)


def comparing_within_groups() -> list[tuple[str, dict[str, Any]]]:
    """Algorithms, and the settings with which they compare the responses to one prompt with each other."""
    kinds = {name: entry.load() for name, entry in ALGORITHMS.items()}
    own: list[tuple[str, dict[str, Any]]] = [(name, {}) for name, kind in kinds.items() if issubclass(kind, (GroupRelative, RLOO))]
    settings: list[dict[str, Any]] = [{"baseline": "group"}, {"baseline": "leave-one-out"}, {"group_baseline": True}]
    return own + [(name, how) for name, kind in kinds.items() for how in settings if set(how) <= set(kind.Config.model_fields)]


@pytest.mark.parametrize(("name", "how"), comparing_within_groups(), ids=str)
def test_what_is_added_to_all_rewards_of_a_prompt_is_no_credit(name: str, how: dict[str, Any]) -> None:
    batch = rollout()
    shift = torch.arange(len(batch.groups), dtype=torch.float64)[batch.group_of_response]
    moved = batch.with_responses(reward=batch.responses["reward"] + 10 * shift)
    before, after = (make(name, **how).credit(b).tokens["advantages"] for b in (batch, moved))
    assert float((before - after).abs().max()) < 1e-9


@names
def test_state_is_json_and_decides_the_future(name: str) -> None:
    settings = {"kl": {"beta": 0.3, "target": 0.01, "horizon": 50}}
    algorithm, fresh = make(name, **settings), make(name, **settings)
    algorithm.credit(rollout())
    state = json.loads(json.dumps(algorithm.state_dict()))
    assert state != fresh.state_dict()
    fresh.load_state_dict(state)
    assert fresh.state_dict() == algorithm.state_dict()
    again, resumed = algorithm.credit(rollout()), fresh.credit(rollout())
    assert all(torch.equal(column, resumed.tokens[key]) for key, column in again.tokens.items())
    assert fresh.state_dict() == algorithm.state_dict()
