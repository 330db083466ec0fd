"""The fast decoder computes what the model computes, and is used only where it does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from trimtab.data.templates import Template
from trimtab.engines.cache import Cache, Prefill
from trimtab.engines.decoder import Decoder, PlainStepper, Stepper, Unknown, choose, fingerprint
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.models import loading
from trimtab.models.language import LanguageModel, plain_logprobs
from trimtab.models.loading import LoraConfig
from trimtab.types import Prompt

PROMPTS = [Prompt(tokens, "") for tokens in ((5, 9, 30), (7,), tuple(range(11, 51)))]
RESPONSES = torch.randint(1, tiny.VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(3))
ANSWERS = [0, 1, 1, 2]


def language(architecture: str, dtype: torch.dtype, lora: bool = False, **changes: Any) -> LanguageModel:
    made = tiny.model(architecture, dtype, scale=1.5, **changes)
    if lora:
        made.requires_grad_(False)
        made = loading.add_adapter(made, LoraConfig(rank=3, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"]), "CAUSAL_LM")
        generator = torch.Generator().manual_seed(5)
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.data = torch.randn(p.shape, generator=generator).to(p.dtype) * 0.3
    return LanguageModel(made, Template.of(tiny.tokenizer()))


@torch.no_grad()
def states(model: LanguageModel, stepper: Stepper, steps: int) -> torch.Tensor:
    """Hidden states after each of the first `steps` tokens of RESPONSES, [steps, rows, width]."""
    prefill = Prefill(PROMPTS, model.device)
    model.hidden(prefill.packed.input_ids, prefill.packed.position_ids, prefill)
    cache = Cache(len(ANSWERS), steps, model.device)
    cache.admit(prefill, ANSWERS)
    return torch.stack([stepper.hidden(RESPONSES[:, t], cache.step(), cache) for t in range(steps)])


KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "llama with another rotary": {
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 1000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_states_equal_the_models_to_rounding(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    model = language(kind.split()[0], dtype, **KINDS[kind])
    assert choose(model) is Decoder
    with torch.no_grad():
        ours, own = states(model, Decoder(model), 40), states(model, PlainStepper(model), 40)
    assert (ours - own).norm() < tolerance * own.norm()


@torch.no_grad()
def test_steps_equal_transformers_on_the_whole_sequence() -> None:
    """As far as transformers, whose norms and softmax are in float32 also here, is exact."""
    model = language("llama", torch.float64)
    logits = Decoder(model).logits(states(model, Decoder(model), 40)[:-1].flatten(0, 1)).view(39, 4, -1)
    ours = torch.log_softmax(logits, -1).gather(2, RESPONSES.t()[1:, :, None])[..., 0]
    with loading.plain_attention(model.plain) as plain:
        theirs = torch.stack([plain_logprobs(plain, PROMPTS[g].tokens, r.tolist())[1:] for g, r in zip(ANSWERS, RESPONSES, strict=True)])
    assert (ours.t() - theirs).abs().max() < 1e-6


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@torch.no_grad()
def test_bfloat16_is_no_further_from_float32_than_plain_transformers(kind: str) -> None:
    """Root mean square error of log-probabilities over all tokens, in the same weights rounded to bfloat16."""
    half = language(kind, torch.bfloat16, num_hidden_layers=4)
    exact = language(kind, torch.float32, num_hidden_layers=4)
    exact.plain.load_state_dict(half.plain.state_dict())

    def ours(model: LanguageModel) -> torch.Tensor:
        stepper = Decoder(model)
        return torch.log_softmax(stepper.logits(states(model, stepper, 40)[:-1].flatten(0, 1)).float(), -1).view(39, 4, -1)

    def theirs(model: LanguageModel) -> torch.Tensor:
        with loading.plain_attention(model.plain) as plain:
            rows = [
                plain(input_ids=torch.tensor([[*PROMPTS[g].tokens, *r.tolist()]])).logits[0, len(PROMPTS[g].tokens) : -1]
                for g, r in zip(ANSWERS, RESPONSES, strict=True)
            ]
        return torch.log_softmax(torch.stack(rows, dim=1).float(), -1)

    truth = theirs(exact)
    assert (ours(half) - truth).square().mean().sqrt() <= 1.05 * (theirs(half) - truth).square().mean().sqrt()


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2"])
def test_models_of_other_parts_decode_through_their_own_forward(architecture: str) -> None:
    model = language(architecture, torch.float32)
    assert choose(model) is PlainStepper
    with pytest.raises(Unknown):
        Decoder(model)


def test_a_model_of_the_known_parts_that_computes_something_else_is_noticed() -> None:
    model = language("llama", torch.float32)
    layer = model.plain.model.layers[1]
    plain = layer.mlp.forward
    layer.mlp.forward = lambda x: 1.1 * plain(x)
    assert choose(model) is PlainStepper


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adapters_are_part_of_the_step_and_can_be_switched_off(dtype: torch.dtype) -> None:
    model = language("llama", dtype, lora=True)
    assert choose(model) is Decoder
    with torch.no_grad():
        on = states(model, Decoder(model), 5)
        assert (on - states(model, PlainStepper(model), 5)).norm() < 2e-5 * on.norm()
        with model.without_adapter():
            off = states(model, Decoder(model), 5)
            assert (off - states(model, PlainStepper(model), 5)).norm() < 2e-5 * off.norm()
    assert (on - off).norm() > 0.01 * on.norm()


def test_the_fingerprint_follows_weights_and_adapters() -> None:
    model = language("llama", torch.float32, lora=True)
    seen = [fingerprint(model)]
    with torch.no_grad():
        next(iter(model.trainable().values())).add_(1e-3)
    seen.append(fingerprint(model))
    with model.without_adapter():
        seen.append(fingerprint(model))
    next(iter(model.plain.parameters())).data.mul_(2)  # leaves no trace in the version
    seen.append(fingerprint(model))
    next(iter(model.plain.parameters())).data.div_(2)
    assert len(set(seen)) == 4
    assert fingerprint(model) == seen[1]


@pytest.mark.parametrize("announced", [True, False])
def test_generation_follows_weights_that_change_in_place(announced: bool) -> None:
    engine = LocalEngine(language("llama", torch.float32), SamplingConfig(max_tokens=8), EngineConfig(rows=8))
    before = engine.generate(PROMPTS, 2, seed=0)
    with torch.no_grad():
        for p in engine.model.plain.parameters():
            p.mul_(0.7)
    if announced:
        engine.load((), 1)
    after = engine.generate(PROMPTS, 2, seed=0)
    fresh = LocalEngine(engine.model, engine.sampling, engine.config).generate(PROMPTS, 2, seed=0)
    assert [r.logprobs for g in after for r in g.responses] == [r.logprobs for g in fresh for r in g.responses]
    assert [r.logprobs for g in after for r in g.responses] != [r.logprobs for g in before for r in g.responses]
