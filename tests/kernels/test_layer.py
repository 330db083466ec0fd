"""A layer computed whole: the model's own mathematics for every family it serves, with little kept, and nothing learnt that is frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from trimtab import kernels
from trimtab.batch import Batch
from trimtab.data.templates import Template
from trimtab.kernels import layer
from trimtab.models import fused, loading
from trimtab.models.language import LanguageModel, plain_logprobs
from trimtab.types import Group, Prompt, Response

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no kernels here: they need AVX-512 with BF16, and a C++ compiler")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEADS = {"head_dim": 32}
GROUPS = (
    Group(Prompt((5, 9, 3, 7, 11, 30, 2), ""), (Response((4, 8, 15, 16, 23, 42, 0), ""), Response((6, 6, 31, 0), ""))),
    Group(Prompt((40, 41), ""), (Response((10, 12, 14, 16, 18, 20, 22, 24, 26), ""),)),
)


def made(architecture: str, dtype: torch.dtype, *, whole: bool = True) -> LanguageModel:
    """Biases that are not zero, norms that are not one; the same weights in every precision."""
    model = tiny.model(architecture, scale=1.5, **HEADS)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(parameter.shape)
    model = model.to(torch.bfloat16).to(dtype)
    if whole:
        fused.take_kernels(model)
    return LanguageModel(model, Template.of(tiny.tokenizer()))


def learnt(model: LanguageModel) -> dict[str, Tensor]:
    """The gradient of all log-probabilities, and these."""
    said = model.forward(Batch(GROUPS)).logprobs
    assert said is not None
    (said * torch.linspace(-1, 1, len(said))).sum().backward()
    grads = {name: p.grad.double() for name, p in model.trainable().items() if p.grad is not None}
    return {**grads, "logprobs": said.detach().double()}


def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every layer that is computed whole from now on."""
    seen: list[Any] = []
    compute = layer.layer

    def counted(*inputs: Any) -> Any:
        seen.append(inputs)
        return compute(*inputs)

    monkeypatch.setattr(layer, "layer", counted)
    return seen


def distance(found: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert found.keys() == right.keys()
    off, size = (sum(float(x.norm()) ** 2 for x in few) for few in ([found[n] - right[n] for n in right], right.values()))
    return float((off / size) ** 0.5)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("family", FAMILIES)
def test_is_no_further_from_the_exact_one_than_its_parts(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = learnt(made(family, torch.float64))
    model = made(family, torch.bfloat16)
    seen = calls(monkeypatch)
    ours = learnt(model)
    assert len(seen) == 2
    theirs = learnt(made(family, torch.bfloat16, whole=False))
    assert distance(ours, right) < 1.05 * distance(theirs, right)
    assert distance(ours, right) < 0.06


@pytest.mark.parametrize("family", FAMILIES)
def test_sees_what_the_plain_model_sees(family: str) -> None:
    """Sliding windows among it, which are shorter than these prompts and responses."""
    model = made(family, torch.bfloat16)
    ours = model.forward(Batch(GROUPS)).logprobs
    assert ours is not None
    with torch.no_grad(), loading.plain_attention(model.plain) as plain:
        theirs = torch.cat([plain_logprobs(plain, g.prompt.tokens, r.tokens) for g in GROUPS for r in g.responses])
    assert float((ours - theirs).abs().mean()) < 0.03


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_added_to_sinks_and_frozen_weights_have_none(family: str) -> None:
    model = made(family, torch.bfloat16)
    right = learnt(model)
    frozen = {name for name in model.trainable() if "layers.0" in name and ("v_proj" in name or "layernorm" in name)}
    assert len(frozen) >= 3
    for name, parameter in model.model.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name not in frozen)
        if "layers" in name and name not in frozen:
            parameter.main_grad = torch.full(parameter.shape, 3.0)
    learnt(model)
    for name, parameter in model.model.named_parameters():
        if name in frozen:
            assert parameter.grad is None
        elif "layers" in name:
            assert parameter.grad is None
            off = (parameter.main_grad.double() - 3.0 - right[name]).norm() / right[name].norm()
            assert float(off) < 5e-3


def test_nothing_is_kept_that_can_be_made_again() -> None:
    model = made("llama", torch.bfloat16)
    parameters = {p.data_ptr() for p in model.model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        if x.data_ptr() not in parameters:
            kept[x.data_ptr()] = x.numel()
        return x

    states = torch.randn(1, 24, 32).to(torch.bfloat16).requires_grad_()
    layout = tiny_layout(24)
    turned = model.plain.base_model.rotary_emb(states, torch.arange(24)[None])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model.plain.base_model.layers[0](states, position_embeddings=turned, layout=layout)
    width, heads, kv, dim, inner = 32, 4, 2, 32, 64
    for table in turned:
        kept.pop(table[0].data_ptr(), None)
    # x, turned queries and keys, values, the log of each query's sum, what attention gave, u, gate and up
    assert sum(kept.values()) == 24 * (width + (heads + 2 * kv) * dim + heads + heads * dim + width + 2 * inner)


def tiny_layout(tokens: int) -> Any:
    from trimtab.models.packed import Layout

    return Layout.of([Group(Prompt((1,) * tokens, ""), ())], keep_last=True)


def test_checkpointed_layers_learn_the_same_bit_for_bit() -> None:
    plain, again = (made("qwen3", torch.bfloat16) for _ in range(2))
    loading.checkpoint_layers(again.model)
    one, other = learnt(plain), learnt(again)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "width", "inner"), [(1, 16, 16), (77, 64, 112), (1300, 96, 80), (33, 2064, 4112)])
def test_is_the_same_without_a_gradient(tokens: int, width: int, inner: int, bias: bool) -> None:
    """Gate and up are not written down then."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=draw) / shape[-1] ** 0.5).to(torch.bfloat16)

    shapes = [(64, width), (32, width), (32, width), (width, 64), (inner, width), (inner, width), (width, inner)]
    weights, biases = [some(*shape).requires_grad_() for shape in shapes], [some(shape[0]) if bias else None for shape in shapes]
    parameters = layer.Parameters._make((*weights, *biases, some(width), some(width), None, None))
    angles = torch.rand(tokens, 32, generator=draw)
    read = (some(tokens, width), angles.cos().bfloat16(), angles.sin().bfloat16())
    seen, setting = tiny_layout(tokens).plan.sequences, layer.Setting(1e-6, 1e-6, 0.0, 32, (32**-0.5, None, None))
    kept = layer.layer(*read, seen, setting, parameters)
    with torch.no_grad():
        assert torch.equal(layer.layer(*read, seen, setting, parameters), kept)
    assert kept.requires_grad
    assert bool(kept.isfinite().all())
    assert float(kept.detach().float().std()) > 0.01


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("threads", [1, 3])
def test_depends_neither_on_threads_nor_on_company(threads: int) -> None:
    model, before = made("llama", torch.bfloat16), torch.get_num_threads()
    whole = model.forward(Batch(GROUPS)).logprobs
    assert whole is not None
    try:
        torch.set_num_threads(threads)
        alone = model.forward(Batch(GROUPS[:1])).logprobs
    finally:
        torch.set_num_threads(before)
    assert alone is not None
    assert torch.equal(alone, whole[: len(alone)])


@pytest.mark.parametrize("change", ["adapter", "another precision", "a module in a projection's place"])
def test_what_is_not_served_is_computed_part_by_part(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", torch.bfloat16)
    first, adapter = model.plain.base_model.layers[0], loading.LoraConfig(rank=2, target_modules=["q_proj"])
    changes: dict[str, Callable[[], Any]] = {
        "adapter": lambda: setattr(model, "model", loading.add_adapter(model.model, adapter, "CAUSAL_LM")),
        "another precision": lambda: model.model.float(),
        "a module in a projection's place": lambda: setattr(first.mlp, "up_proj", torch.nn.Sequential(first.mlp.up_proj)),
    }
    said = model.forward(Batch(GROUPS)).logprobs
    changes[change]()
    seen = calls(monkeypatch)
    other = model.forward(Batch(GROUPS)).logprobs
    assert said is not None
    assert other is not None
    assert len(seen) == (1 if change.startswith("a module") else 0)
    assert float((said - other).abs().mean()) < 0.03
