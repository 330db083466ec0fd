"""The compiled kernels compute what plain torch computes, nearer to the exact result, and the same for any number of threads."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

import tiny
from trimtab import kernels
from trimtab.batch import Batch
from trimtab.kernels import adamw, elementwise, products
from trimtab.maths.logprobs import Head, token_logprobs
from trimtab.models import attention as blocks
from trimtab.models import fused
from trimtab.models.attention import AttentionSettings, Plan
from trimtab.models.packed import Layout
from trimtab.types import Group, Prompt, Response

there = pytest.mark.skipif(kernels.library() is None, reason="no kernels here: they need AVX-512 with BF16, and a C++ compiler")
both = pytest.mark.usefixtures("instructions")

SIZES = {
    "pairs": [(70, (5, 90)), (3, (2, 2)), (11, (1, 300))],
    "a group": [(60, (4, 9, 1, 9, 3, 80, 2, 60))],
    "ragged": [(1, (3,)), (40, (2, 1)), (2, (50, 1, 1)), (5, ()), (17, (33,))],
    "long": [(1100, (40,)), (2100, (16, 1))],
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def layout_of(sizes: Sequence[tuple[int, Sequence[int]]]) -> Layout:
    groups = [Group(Prompt((1,) * p, ""), tuple(Response((1,) * n, "") for n in answers)) for p, answers in sizes]
    return Layout.of(groups, keep_last=True)


def values_and_gradients(compute: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    out = compute(*leaves)
    out.backward(draw(*out.shape, seed=9).to(dtype))
    return [out.detach(), *(x.grad for x in leaves if x.grad is not None)]


def error(found: Tensor, right: Tensor) -> float:
    return float((found.double() - right).norm() / right.norm())


@both
@there
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("sizes", "queries"), [*((sizes, 3) for sizes in SIZES), ("ragged", 1), ("ragged", 5)])
def test_attention_is_nearer_to_the_exact_one_than_torch(sizes: str, queries: int, window: int | None, softcap: float | None) -> None:
    plan, settings = layout_of(SIZES[sizes]).plan, AttentionSettings(0.2, window, softcap)
    inputs = [draw(plan.tokens, heads, 32, seed=i) for i, heads in enumerate((2 * queries, 2, 2))]

    def torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        fresh = Plan(plan.spans, plan.tokens)
        return blocks._Attention.apply(q, k, v, fresh, settings)  # type: ignore[no-any-return, no-untyped-call]

    ours = values_and_gradients(lambda q, k, v: blocks.attention(q, k, v, plan, settings), inputs, torch.bfloat16)
    theirs = values_and_gradients(torchs, inputs, torch.bfloat16)
    right = values_and_gradients(torchs, inputs, torch.float64)
    for found, other, exact in zip(ours, theirs, right, strict=True):
        assert error(found, exact) < min(4e-3, 1.01 * error(other, exact))


@both
@there
def test_attention_depends_neither_on_threads_nor_on_company() -> None:
    sizes = [(30, (20, 45)), (8, (5,)), (90, (7, 7, 7))]
    settings, threads = AttentionSettings(0.2, None, None), torch.get_num_threads()
    plan = layout_of(sizes).plan
    inputs = [draw(plan.tokens, heads, 64, seed=i) for i, heads in enumerate((4, 2, 2))]
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(values_and_gradients(lambda *x: blocks.attention(*x, plan, settings), inputs, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    alone = layout_of(sizes[:1]).plan
    out = blocks.attention(*(x[: alone.tokens] for x in inputs), alone, settings)
    assert torch.equal(out, found[0][0][: alone.tokens])


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    exact = x.float() if x.dtype == torch.bfloat16 else x
    return weight * (exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def plain_rotation(x: Tensor) -> Tensor:
    cos, sin = (table.to(x.dtype)[:, None] for table in tables(len(x)))
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


def tables(n: int) -> tuple[Tensor, Tensor]:
    angle = torch.rand(n, 32, generator=torch.Generator().manual_seed(3)) * 6
    angle = torch.cat([angle, angle], -1)
    return angle.cos().to(torch.bfloat16), angle.sin().to(torch.bfloat16)


ELEMENTWISE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
    "norm": (lambda x, w: elementwise.rms_norm(x, w, 1e-5), plain_norm, [draw(100, 48), 1 + draw(48, seed=1) / 4]),
    "gate": (elementwise.swiglu, lambda g, u: nn.functional.silu(g) * u, [4 * draw(77, 32), draw(77, 32, seed=1)]),
    "rotation": (lambda x: elementwise.rotate(x, *tables(len(x))), plain_rotation, [draw(55, 3, 64)]),
}


@there
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_is_nearer_to_the_exact_one_than_torch(name: str) -> None:
    ours, torchs, inputs = ELEMENTWISE[name]
    right = values_and_gradients(torchs, inputs, torch.float64)
    for found, other, exact in zip(
        values_and_gradients(ours, inputs, torch.bfloat16), values_and_gradients(torchs, inputs, torch.bfloat16), right, strict=True
    ):
        assert error(found, exact) < min(3e-3, error(other, exact))


@there
def test_gate_of_extreme_numbers_is_finite() -> None:
    gate = torch.tensor([[-3e38, -200.0, -90.0, 0.0, 90.0, 200.0, 3e38, 1.0] * 2]).to(torch.bfloat16).requires_grad_()
    out = elementwise.swiglu(gate, torch.ones_like(gate))
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(gate.grad).all()
    assert float(out.detach()[0, :4].abs().max()) < 1e-30
    assert torch.equal(out[0, 4:7], gate[0, 4:7])


@both
@there
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "sizes", [(1, 16, 48), (77, 64, 112), (600, 48, 32), (2501, 80, 16), (19, 4112, 96), (30, 96, 4112), (520, 96, 16448)]
)
def test_linear_layers_are_nearer_to_the_exact_ones_than_torch(sizes: tuple[int, int, int], bias: bool) -> None:
    rows, inner, outer = sizes
    inputs = [draw(rows, inner), draw(outer, inner, seed=1), *([draw(outer, seed=2)] if bias else [])]
    ours = values_and_gradients(lambda x, w, b=None: products.linear(x, w, b), inputs, torch.bfloat16)
    theirs = values_and_gradients(nn.functional.linear, inputs, torch.bfloat16)
    right = values_and_gradients(nn.functional.linear, inputs, torch.float64)
    for found, other, exact in zip(ours, theirs, right, strict=True):
        assert error(found, exact) <= min(4e-3, 1.01 * error(other, exact))


@both
@there
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "inner", "outer"),
    [(1, 16, (16, 48)), (55, 96, (80,)), (77, 64, (112, 16, 64)), (650, 2064, (32, 4112)), (33, 4112, (80, 80)), (279, 64, (16416,))],
)
def test_layers_that_read_the_same_rows_are_nearer_to_the_exact_ones_than_torch(
    rows: int, inner: int, outer: tuple[int, ...], bias: bool
) -> None:
    x, weights = draw(rows, inner), [draw(n, inner, seed=n) for n in outer]
    biases, plus = [draw(n, seed=n + 1) if bias else None for n in outer], draw(rows, outer[0], seed=5)
    grads, sums = [draw(rows, n, seed=n + 2) for n in outer], [torch.ones(n, inner) for n in outer]

    def torchs(dtype: torch.dtype) -> list[Tensor]:
        cast = [[None if t is None else t.to(dtype) for t in few] for few in ([x], weights, biases, [plus], grads)]
        (x_,), weights_, biases_, (plus_,), grads_ = cast
        outs = [nn.functional.linear(x_, w, b) for w, b in zip(weights_, biases_, strict=True)]  # type: ignore[arg-type]
        by_x = sum(g @ w for g, w in zip(grads_, weights_, strict=True))  # type: ignore[operator]
        by_weights = [g.t() @ x_ for g in grads_]  # type: ignore[union-attr]
        return [*outs, outs[0] + plus_, by_x, *by_weights]  # type: ignore[list-item, operator]

    added = products.outputs(x, weights[:1], biases[:1], plus)
    products.add_weight_gradients(grads, x, sums)
    ours = [*products.outputs(x, weights, biases), *added, products.input_gradient(grads, weights), *(t - 1 for t in sums)]
    for found, other, exact in zip(ours, torchs(torch.bfloat16), torchs(torch.float64), strict=True):
        assert error(found, exact) <= min(4e-3, 1.01 * error(other, exact))


@there
def test_adamw_in_halves_is_adamw() -> None:
    starts = [draw(*shape) for shape in ((1,), (576,), (33, 7), (1 << 14,), (3, 16401))]
    theirs = [nn.Parameter(start.float()) for start in starts]
    torchs = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1, fused=True)
    halves = [adamw.Halves(nn.Parameter(start.clone()), torch.zeros(start.shape)) for start in starts]
    for step in range(5):
        for half, their in zip(halves, theirs, strict=True):
            gradient = draw(*their.shape, seed=step).float()
            half.grad.copy_(gradient)
            their.grad = 0.5 * gradient
        whole = torch.cat([half.grad.flatten() for half in halves]).double()
        assert adamw.norm(halves) == pytest.approx(float(whole.norm()), rel=1e-6)
        adamw.step(halves, scale=0.5, lr=3e-3, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1)
        torchs.step()
        for half, their in zip(halves, theirs, strict=True):
            assert not half.grad.any()
            moments = ((getattr(half, name), torchs.state[their][name]) for name in ("exp_avg", "exp_avg_sq"))
            for ours, other in ((half.weight(), their), *moments):
                assert error(ours, other.detach().double()) < 2e-7
    for half, start in zip(halves, starts, strict=True):
        assert torch.equal(half.parameter, half.weight().bfloat16())  # no draw here lies in the middle of two bfloat16 numbers
        assert float((half.weight() - start.float()).abs().mean()) > 1e-4


@there
def test_a_number_is_its_two_halves() -> None:
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    edges = torch.tensor([0, 0x8000, 0x7FFF, 0x18000, 0x3F808000, -(2**31), -(2**31) + 0x8000, 0x7F7FFFFF, 1], dtype=torch.int32)
    numbers = torch.cat([bits, edges]).view(torch.float32)
    numbers = numbers[torch.isfinite(numbers)]
    upper, lower = adamw.split(numbers)
    assert torch.equal(adamw.joined(upper, lower).view(torch.int32), numbers.view(torch.int32))
    tied = numbers.view(torch.int32) % 2**16 == 2**15
    assert torch.equal(upper[~tied], numbers[~tied].bfloat16())
    assert tied.sum() >= 3
    assert bool((upper[tied].double().abs() > numbers[tied].double().abs()).all())


@both
@there
def test_linear_layers_depend_neither_on_threads_nor_on_company() -> None:
    x, weight, grad = draw(700, 2064), draw(96, 2064, seed=1), draw(700, 96, seed=2)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            sums = torch.ones(96, 2064)
            products.add_weight_gradients([grad], x, [sums])
            found.append([products.linear(x, weight, None), products.input_gradient([grad], [weight]), sums])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    assert torch.equal(products.linear(x[690:693], weight, None), found[0][0][690:693])


@both
@there
def test_a_linear_layer_may_be_given_no_rows() -> None:
    x, weight = draw(0, 32).requires_grad_(), draw(16, 32, seed=1).requires_grad_()
    out = products.linear(x, weight, None)
    out.sum().backward()
    assert out.shape == (0, 16)
    assert x.grad is not None
    assert x.grad.shape == (0, 32)
    assert weight.grad is not None
    assert not weight.grad.any()


@both
@there
def test_weight_gradients_are_added_up_in_float32_where_the_optimiser_wants_them() -> None:
    x, weight = draw(50, 32), draw(16, 32, seed=1).requires_grad_()
    weight.main_grad = torch.full((16, 32), 1e4)  # type: ignore[attr-defined]
    products.linear(x, weight, None).sum().backward()
    assert weight.grad is None
    assert error(weight.main_grad - 1e4, x.double().sum(0).expand(16, 32)) < 1e-3  # type: ignore[attr-defined]


@there
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_copied_model_takes_its_own_weights(architecture: str) -> None:
    model = tiny.model(architecture, torch.bfloat16)
    fused.take_kernels(model)
    replaced = [module for module in model.modules() if "forward" in vars(module) and type(module) is not nn.Linear]
    assert len(replaced) == {"llama": 11, "qwen3": 15, "gemma3": 0}[architecture]  # Gemma's norm multiplies by 1 + w, its gate is another
    for module in copy.deepcopy(model).modules():
        if "forward" in vars(module):
            assert module.forward.__self__ is module


@there
def test_adapters_train_through_the_kernels() -> None:
    from peft import LoraConfig, get_peft_model

    from trimtab.data.templates import Template
    from trimtab.models.language import LanguageModel

    base = tiny.model("llama", torch.bfloat16, head_dim=32)
    fused.take_kernels(base)
    model = LanguageModel(
        get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")), Template.of(tiny.tokenizer())
    )
    model.forward(Batch((Group(Prompt((1, 2), ""), (Response((3, 4, 0), ""),)),))).logprobs.sum().backward()
    grads = [p.grad for name, p in model.model.named_parameters() if "lora_B" in name]
    assert len(grads) == 14
    assert all(grad is not None and bool(grad.any()) for grad in grads)


def test_switched_off_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_KERNELS", "off")
    assert kernels.library.__wrapped__() is None


@there
def test_a_compiler_that_fails_is_named_and_done_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with caplog.at_level(logging.WARNING):
        assert kernels.library.__wrapped__() is None
    assert "could not be compiled" in caplog.text


@there
def test_compiled_once(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path))
    compiler = kernels._compiler()
    assert compiler is not None
    first = kernels._compiled(compiler, kernels._processor())
    written = first.stat().st_mtime_ns
    assert kernels._compiled(compiler, kernels._processor()) == first
    assert first.stat().st_mtime_ns == written
    assert [file.name for file in first.parent.iterdir()] == [first.name]


@there
@pytest.mark.parametrize("vocabulary", [100, 4096])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("entropy", [False, True])
def test_head_is_no_further_from_the_exact_one_than_torch(
    vocabulary: int, temperature: float, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = draw(40, 32), draw(vocabulary, 32, seed=1), torch.arange(40) % vocabulary
    hidden[0] = 20 * weight[0]  # a token that is almost sure

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        logprobs, entropies = token_logprobs(hidden, Head(weight, scale=0.5), targets, temperature=temperature, entropy=entropy)
        return logprobs if entropies is None else torch.stack([logprobs, entropies])

    ours = values_and_gradients(compute, [hidden, weight], torch.bfloat16)
    monkeypatch.setattr(kernels, "serves", lambda x: False)
    theirs = values_and_gradients(compute, [hidden, weight], torch.bfloat16)
    right = values_and_gradients(compute, [hidden, weight], torch.float64)
    for found, other, exact in zip(ours, theirs, right, strict=True):
        assert error(found, exact) < 1.02 * error(other, exact) + 1e-6


@both
@there
@pytest.mark.parametrize("vocabulary", [4096, 1072])
def test_log_probabilities_are_made_of_logits_in_float32(vocabulary: int) -> None:
    hidden, weight, bias = draw(70, 64), draw(vocabulary, 64, seed=1), draw(vocabulary, seed=2)
    targets = torch.arange(70) * 13 % vocabulary
    with torch.no_grad():
        logprobs, entropies = token_logprobs(hidden, Head(weight, bias, scale=0.5), targets, temperature=0.7, entropy=True)
        exact = token_logprobs(hidden.double(), Head(weight.double(), bias.double(), scale=0.5), targets, temperature=0.7, entropy=True)
        few, _ = token_logprobs(hidden[11:20], Head(weight, bias, scale=0.5), targets[11:20], temperature=0.7)
    assert torch.allclose(logprobs.double(), exact[0], atol=2e-5)  # logits rounded to bfloat16 put them 0.02 away
    assert entropies is not None
    assert exact[1] is not None
    assert torch.allclose(entropies.double(), exact[1], atol=2e-5)
    assert torch.equal(few, logprobs[11:20])  # whatever rows stand beside


@both
@there
@pytest.mark.parametrize("parts", [1, 3])
def test_a_token_that_is_next_to_impossible(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, targets = draw(9, 32), draw(4096, 32, seed=1), torch.arange(9) + 40
    hidden[[2, 5]] = -30 * weight[targets[[2, 5]]]  # the logit of the target is about 2,000 below the highest
    monkeypatch.setattr("trimtab.maths.logprobs.PART_BYTES", 2**28 if parts == 1 else 3 * 4096 * 2)

    def compute(hidden: Tensor, weight: Tensor) -> Tensor:
        return token_logprobs(hidden, Head(weight), targets)[0]

    ours = values_and_gradients(compute, [hidden, weight], torch.bfloat16)
    right = values_and_gradients(compute, [hidden, weight], torch.float64)
    assert float(ours[0].min()) < -1000
    for found, exact, most in zip(ours, right, (1e-6, 5e-3, 5e-3), strict=True):
        assert error(found, exact) < most
