"""The compiled decoder and draw compute what the plain ones compute, at least as exactly, and no row depends on another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import tiny
from trimtab import kernels
from trimtab.data.templates import Template
from trimtab.engines.cache import Cache, Prefill
from trimtab.engines.decoder import CompiledDecoder, Decoder, Stepper, Unknown, choose
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig, draw, draw_from_head
from trimtab.kernels import decode
from trimtab.maths.logprobs import Head
from trimtab.models import loading
from trimtab.models.language import LanguageModel, plain_logprobs
from trimtab.models.loading import LoraConfig
from trimtab.models.scratch import elsewhere
from trimtab.types import Prompt

pytestmark = pytest.mark.skipif(kernels.library() is None, reason="no compiler, or a processor without AVX-512 BF16")

PROMPTS = [Prompt(tokens, "") for tokens in ((5, 9, 30), (7,), tuple(range(11, 51)))]
ANSWERS = [0, 1, 1, 2, 2, 1, 2, 2, 2, 2, 2, 2, 2, 2]
STEPS = 40
RESPONSES = torch.randint(1, tiny.VOCABULARY, (len(ANSWERS), STEPS), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def threads_as_they_were() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama of odd sizes": {"hidden_size": 48, "intermediate_size": 110, "num_attention_heads": 6, "num_key_value_heads": 3},
    "llama with a key head for each query": {"num_key_value_heads": 4},
    "qwen3": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with another rotary": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}  # fmt: skip


def language(kind: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> LanguageModel:
    settings = {"hidden_size": 64, "head_dim": 32, "num_hidden_layers": 4, **KINDS.get(kind, {}), **changes}
    made = tiny.model(kind.split()[0], torch.float32, scale=1.5, **settings)
    generator = torch.Generator().manual_seed(6)
    for p in made.parameters():
        if p.dim() == 1:  # norms and biases that show
            p.data += torch.randn(p.shape, generator=generator) * 0.3
    return LanguageModel(made.to(torch.bfloat16).to(dtype), Template.of(tiny.tokenizer()))


@torch.no_grad()
def states(model: LanguageModel, stepper: Stepper, rows: list[int] | None = None, threads: int = 1, **asked: Any) -> torch.Tensor:
    """Hidden states after each token of these rows, [steps, rows, width]; `asked` changes what attention is asked for."""
    torch.set_num_threads(1)  # the prompts are read by torch
    rows = list(range(len(ANSWERS))) if rows is None else rows
    prefill = Prefill(PROMPTS, model.device)
    model.hidden(prefill.packed.input_ids, prefill.packed.position_ids, prefill)
    cache = Cache(len(rows), STEPS, model.device)
    cache.admit(prefill, [ANSWERS[row] for row in rows])
    cache.settings = {i: replace(settings, **asked) for i, settings in cache.settings.items()}
    torch.set_num_threads(threads)
    return torch.stack([stepper.hidden(RESPONSES[rows, t], cache.step(), cache).float() for t in range(STEPS)])


@pytest.mark.parametrize("asked", [{}, {"window": 7}, {"softcap": 2.0}, {"window": 50, "softcap": 1.0}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_states_are_no_further_from_float32_than_those_of_plain_operations(kind: str, asked: dict[str, Any]) -> None:
    half, exact = language(kind), language(kind, torch.float32)
    assert choose(half) is CompiledDecoder
    truth = states(exact, Decoder(exact), **asked)
    ours, plain = ((states(half, stepper, **asked) - truth).norm() / truth.norm() for stepper in (CompiledDecoder(half), Decoder(half)))
    assert ours <= 1.02 * plain
    assert ours < 0.02


def test_a_row_depends_neither_on_its_company_nor_on_threads() -> None:
    model = language("qwen3")
    together = states(model, CompiledDecoder(model))
    for rows in ([3], [2, 0, 9], list(range(13, 4, -1))):
        assert torch.equal(states(model, CompiledDecoder(model), rows), together[:, rows])
    for threads in (2, 3):
        assert torch.equal(states(model, CompiledDecoder(model), threads=threads), together)


@pytest.mark.parametrize(
    "changes", [{"head_dim": 16}, {"hidden_act": "gelu"}, {"dtype": torch.float32}, {"dtype": torch.float64}, {"hidden_size": 40}], ids=str
)
def test_models_it_cannot_compute_are_left_to_plain_operations(changes: dict[str, Any]) -> None:
    model = language("llama", **changes)
    with pytest.raises(Unknown):
        CompiledDecoder(model)
    assert choose(model) is Decoder


def test_layers_of_different_sizes_are_left_to_plain_operations() -> None:
    model = language("llama")
    mlp = model.plain.model.layers[1].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16))
    mlp.down_proj = torch.nn.Linear(32, 64, bias=False, dtype=torch.bfloat16)
    assert choose(model) is Decoder


def test_adapters_are_left_to_plain_operations() -> None:
    made = loading.add_adapter(language("llama").model, LoraConfig(rank=3), "CAUSAL_LM")
    assert choose(LanguageModel(made, Template.of(tiny.tokenizer()))) is Decoder


@pytest.mark.parametrize(("max_tokens", "reuse"), [(40, False), (70, False), (70, True)])
def test_logprobs_of_a_batch_that_comes_and_goes_are_those_of_transformers(max_tokens: int, reuse: bool) -> None:
    model, exact = language("llama"), language("llama", torch.float32)
    engine = LocalEngine(model, SamplingConfig(max_tokens=max_tokens), EngineConfig(rows=5, reuse=reuse))
    for _ in range(1 + reuse):  # the second time from drafts
        groups = engine.generate([*PROMPTS, *PROMPTS], 4, seed=1)
    assert isinstance(engine.stepper(), CompiledDecoder)
    pairs = [(group.prompt.tokens, r) for group in groups for r in group.responses]
    assert len({len(r.tokens) for _, r in pairs}) > 5
    with torch.no_grad(), loading.plain_attention(exact.plain) as plain:
        theirs = torch.cat([plain_logprobs(plain, prompt, r.tokens) for prompt, r in pairs])
    ours = torch.tensor([x for _, r in pairs for x in r.logprobs or ()])
    assert (ours - theirs).square().mean().sqrt() < 0.03


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 15, 24, 33])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (50, 130), (576, 96)])
def test_products_are_rounded_once(rows: int, inputs: int, outputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    x, weight, bias = (torch.randn(*size, generator=generator).bfloat16() for size in ((rows, inputs), (outputs, inputs), (outputs,)))
    exact = x.double() @ weight.double().t()
    for added in (None, bias):
        right = exact if added is None else exact + added.double()
        found = decode.Matrix([weight], [added], elsewhere)(x).double()
        assert ((found - right).abs() <= 2**-8 * right.abs() + 1e-4 * inputs**0.5).all()


@pytest.mark.parametrize("vocabulary", [11, 256, 1000, 4099])
@pytest.mark.parametrize(("temperature", "scale", "softcap"), [(1.0, 1.0, None), (0.7, 1.0, None), (1.3, 0.5, 4.0)])
def test_the_same_numbers_draw_the_same_tokens(vocabulary: int, temperature: float, scale: float, softcap: float | None) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    z = (torch.randn(300, vocabulary, generator=generator) * 3).bfloat16()
    uniform = torch.rand(300, dtype=torch.float64, generator=generator)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    head, config = Head(torch.zeros(vocabulary, 4), None, scale, softcap), SamplingConfig(temperature=temperature)
    tokens, logprobs = draw_from_head(z, head, uniform, config)
    right, expected = draw(head.finish(z, temperature).double(), uniform, config)
    assert (tokens != right).sum() <= 1  # a number may lie within rounding of a boundary
    same = tokens == right
    assert torch.allclose(logprobs[same].double(), expected[same], atol=1e-5)


def test_tokens_of_probability_zero_are_never_drawn() -> None:
    z = torch.full((4, 700), -1e4, dtype=torch.bfloat16)
    z[:, 300], z[:, 310] = 0.0, 1.0
    tokens, _ = decode.draw(z, torch.tensor([0.0, 0.2, 0.3, 1.0], dtype=torch.float64), 1.0, 0.0)
    assert tokens.tolist() == [300, 300, 310, 310]
