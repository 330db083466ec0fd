"""The update does not depend on how a minibatch is cut, and steps as its settings say."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import tiny
from trimtab import kernels
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.data.templates import Template
from trimtab.errors import NumericalError
from trimtab.kernels import adamw
from trimtab.maths.reductions import aggregate
from trimtab.models.language import LanguageModel
from trimtab.training.optimiser import OptimConfig, Optimiser, learning_rate
from trimtab.training.update import update
from trimtab.types import Group, Prompt, Response

GROUPS = tuple(Group(Prompt((5 + i, 9), ""), (Response((3, 7 + i, 0), ""), Response((8,) * (i + 1) + (0,), ""))) for i in range(8))


def nll(how: str):  # type: ignore[no-untyped-def]
    def loss(outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        value = aggregate(-outputs.logprobs, batch.mask, batch.response_of_token, how, tokens=counts.tokens, responses=counts.responses)
        return Loss(value, {"nll": value}, {"largest": outputs.logprobs.max()})

    return loss


def trained(
    dtype: torch.dtype, budget: int, how: str = "token", order: list[int] | None = None, **optim: float
) -> tuple[dict, torch.Tensor]:
    model = LanguageModel(tiny.model("llama", dtype, scale=1.0), Template.of(tiny.tokenizer()))
    optimiser = Optimiser(model.trainable(), OptimConfig(lr=1e-2, schedule="constant", **optim), 10)
    batch = Batch(GROUPS).select(order or range(8))
    metrics = {}
    for step in range(2):
        metrics = update(batch, model.forward, nll(how), [optimiser], at=step, token_budget=budget)
    return metrics, torch.cat([p.detach().flatten().double() for p in model.model.parameters()])


@pytest.mark.parametrize("how", ["token", "sequence", "fixed-length"])
def test_micro_batches_and_order_change_nothing(how: str) -> None:
    metrics, whole = trained(torch.float64, 10_000, how)
    for budget, order in ((1, None), (25, None), (25, [7, 2, 0, 1, 3, 6, 5, 4])):
        other_metrics, other = trained(torch.float64, budget, how, order)
        assert (whole - other).abs().max() < 1e-9
        assert other_metrics == pytest.approx(metrics, abs=1e-9)


@pytest.mark.parametrize("halves", [True, False])
def test_bfloat16_steps_in_float32_lose_no_small_updates(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if halves and kernels.library() is None:
        pytest.skip("no kernels here: they need AVX-512 with BF16, and a C++ compiler")
    monkeypatch.setattr(adamw, "serves", lambda parameter: halves)
    model = LanguageModel(tiny.model("llama", torch.bfloat16, scale=1.0), Template.of(tiny.tokenizer()))
    optimiser = Optimiser(model.trainable(), OptimConfig(lr=1e-5, schedule="constant"), 100)
    start = {name: weight.clone() for name, weight in optimiser.weights().items()}
    for step in range(3):
        update(Batch(GROUPS), model.forward, nll("token"), [optimiser], at=step, token_budget=50)
    name = "model.layers.0.mlp.up_proj.weight"
    moved = (optimiser.weights()[name] - start[name]).abs()
    assert 0 < float(moved.mean()) < 5e-5
    assert torch.equal(optimiser.parameters[name], optimiser.weights()[name].bfloat16())
    assert bool(optimiser.halves) == halves


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_steps_without_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "library", lambda: None)
    start = torch.cat([p.detach().flatten().double() for p in tiny.model("llama", dtype, scale=1.0).parameters()])
    metrics, after = trained(dtype, 50)
    assert 0 < metrics["grad_norm"] < 100
    assert 1e-4 < float((after - start).abs().mean()) < 0.1


@pytest.mark.parametrize("halves", [True, False])
def test_what_was_saved_goes_on_bit_for_bit(halves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if halves and kernels.library() is None:
        pytest.skip("no kernels here: they need AVX-512 with BF16, and a C++ compiler")
    monkeypatch.setattr(adamw, "serves", lambda parameter: halves)

    def fresh() -> tuple[LanguageModel, Optimiser]:
        model = LanguageModel(tiny.model("llama", torch.bfloat16, scale=1.0), Template.of(tiny.tokenizer()))
        return model, Optimiser(model.trainable(), OptimConfig(lr=1e-3, weight_decay=0.1), 100)

    (model, optimiser), (other, another) = fresh(), fresh()
    for step in range(3):
        saved = copy.deepcopy(optimiser.state_dict())
        update(Batch(GROUPS), model.forward, nll("token"), [optimiser], at=step, token_budget=50)
        another.load_state_dict(saved)
        update(Batch(GROUPS), other.forward, nll("token"), [another], at=step, token_budget=50)
        for name, weight in optimiser.weights().items():
            assert torch.equal(weight, another.weights()[name])
            assert torch.equal(model.trainable()[name], other.trainable()[name])


def test_bfloat16_gradients_add_up_in_float32() -> None:
    few, _ = trained(torch.bfloat16, 10_000)
    many, _ = trained(torch.bfloat16, 1)
    assert many["grad_norm"] == pytest.approx(few["grad_norm"], rel=0.03)


def test_gradient_clipping_clips() -> None:
    model = LanguageModel(tiny.model("gpt2", torch.float64), Template.of(tiny.tokenizer()))
    optimiser = Optimiser(model.trainable(), OptimConfig(max_grad_norm=0.5), 10)
    out = model.forward(Batch(GROUPS))
    (100 * out.logprobs.sum()).backward()
    seen: list[float] = []
    optimiser.adam.register_step_pre_hook(
        lambda adam, *_: seen.append(math.sqrt(sum(float(p.grad.square().sum()) for g in adam.param_groups for p in g["params"])))
    )
    norm = optimiser.grad_norm()
    optimiser.step(0, norm)
    assert norm > 0.5
    assert seen == [pytest.approx(0.5)]


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_samples() -> None:
    model = LanguageModel(tiny.model("llama"), Template.of(tiny.tokenizer()))
    optimiser = Optimiser(model.trainable(), OptimConfig(), 10)
    before = {name: p.clone() for name, p in model.trainable().items()}
    bad = lambda outputs, batch, counts: Loss(outputs.logprobs.sum() * float("nan"))  # noqa: E731
    with pytest.raises(NumericalError, match="micro-batch 0, 16 responses"):
        update(Batch(GROUPS), model.forward, bad, [optimiser], at=0, token_budget=10_000)
    infinite = lambda outputs, batch, counts: Loss(outputs.logprobs.sum() * torch.tensor(1e38) * 1e38 * 0 + outputs.logprobs.sum() * 3e38)  # noqa: E731
    with pytest.raises(NumericalError):
        update(Batch(GROUPS), model.forward, infinite, [optimiser], at=0, token_budget=10_000)
    assert all(torch.equal(before[name], p) for name, p in model.trainable().items())
    assert all(p.grad is None for p in model.trainable().values())


def test_learning_rate_shapes() -> None:
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=3), 0, 10) == pytest.approx(0.25)
    assert learning_rate(OptimConfig(lr=1.0, warmup_steps=3), 3, 10) == 1.0
    assert learning_rate(OptimConfig(lr=1.0, schedule="linear"), 5, 10) == 0.5
    assert learning_rate(OptimConfig(lr=1.0, schedule="cosine"), 10, 10) == pytest.approx(0)
    assert learning_rate(OptimConfig(lr=1.0, schedule="constant"), 10, 10) == 1.0
