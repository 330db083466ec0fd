"""The packed shared-prompt forward equals the plain model, run one sequence at a time."""

from __future__ import annotations

import random

import pytest
import torch

import tiny
from trimtab.batch import Batch
from trimtab.data.templates import Template
from trimtab.maths import logprobs as logprobs_module
from trimtab.models import blocks, loading, packed
from trimtab.models.language import LanguageModel, plain_logprobs
from trimtab.types import Group, Prompt, Response

# transformers computes rotary embeddings and RMS norms in float32 whatever the dtype, GPT-2 has neither
TOLERANCE = {"gpt2": 1e-12, "llama": 1e-6, "qwen3": 1e-6, "gemma3": 1e-6}
SHAPES = {"sft": [1, 1, 1, 1, 1], "pairs": [2, 2, 2], "group of 8": [8, 8], "mixed": [1, 5, 2, 3]}


def random_groups(sizes: list[int], seed: int = 0, longest: int = 20) -> tuple[Group, ...]:
    """Random lengths; token 0 is pad and EOS at once and occurs inside prompts and responses too."""
    rng = random.Random(seed)

    def tokens(low: int) -> tuple[int, ...]:
        return tuple(rng.randrange(tiny.VOCABULARY) if rng.random() > 0.1 else 0 for _ in range(rng.randint(low, longest)))

    return tuple(Group(Prompt(tokens(1), ""), tuple(Response((*tokens(0), 0), "") for _ in range(size))) for size in sizes)


def language_model(architecture: str, dtype: torch.dtype = torch.float64, **changes: object) -> LanguageModel:
    return LanguageModel(tiny.model(architecture, dtype, **changes), Template.of(tiny.tokenizer()))


def plain(model: LanguageModel, groups: tuple[Group, ...]) -> torch.Tensor:
    with loading.plain_attention(model.plain) as reference:
        return torch.cat([plain_logprobs(reference, g.prompt.tokens, r.tokens) for g in groups for r in g.responses])


@pytest.mark.parametrize("architecture", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_logprobs_and_gradients_equal_the_plain_model(architecture: str, shape: str) -> None:
    model = language_model(architecture)
    groups = random_groups(SHAPES[shape])
    weights = torch.randn(sum(len(r.tokens) for g in groups for r in g.responses), dtype=torch.float64, generator=torch.manual_seed(1))
    results = []
    for compute in (lambda: model.forward(Batch(groups)).logprobs, lambda: plain(model, groups)):
        model.model.zero_grad()
        logprobs = compute()
        (logprobs * weights).sum().backward()
        results.append((logprobs.detach(), {name: p.grad.clone() for name, p in model.model.named_parameters()}))
    (ours, our_grads), (theirs, their_grads) = results
    assert (ours - theirs).abs().max() < TOLERANCE[architecture]
    for name, grad in their_grads.items():
        assert (our_grads[name] - grad).abs().max() < TOLERANCE[architecture] * max(1.0, float(grad.abs().max())), name


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3"])
def test_layout_in_several_blocks_changes_nothing(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model(architecture)
    groups = random_groups([1, 4, 2, 3, 1, 2], seed=3)
    together = model.forward(Batch(groups)).logprobs
    monkeypatch.setattr(blocks, "_alike", lambda spans: [[span] for span in spans])
    apart = model.forward(Batch(groups)).logprobs
    assert (together - apart).abs().max() < 1e-12


def test_shared_prompt_equals_repeated_prompt() -> None:
    model = language_model("llama")
    (group,) = random_groups([6])
    repeated = tuple(group.only([i]) for i in range(6))
    assert (model.forward(Batch((group,))).logprobs - model.forward(Batch(repeated)).logprobs).abs().max() < 1e-12


def test_tokens_of_one_response_do_not_see_another() -> None:
    model = language_model("qwen3")
    (group,) = random_groups([3])
    other = Group(group.prompt, (group.responses[0], Response((5, 6, 7), ""), group.responses[2]))
    n = len(group.responses[0].tokens)
    before, after = (model.forward(Batch((g,))).logprobs[:n] for g in (group, other))
    assert torch.allclose(before, after, atol=1e-12)


def test_chunks_and_recomputation_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = language_model("gpt2")
    groups = random_groups([3, 2])
    grads = []
    for slice_elements, part_bytes in ((2**21, 2**28), (5 * tiny.VOCABULARY, 2**28), (3 * tiny.VOCABULARY, 7 * 8 * tiny.VOCABULARY)):
        monkeypatch.setattr(logprobs_module, "SLICE_ELEMENTS", slice_elements)
        monkeypatch.setattr(logprobs_module, "PART_BYTES", part_bytes)
        model.model.zero_grad()
        out = model.forward(Batch(groups), temperature=0.7, entropy=True)
        (out.logprobs.sum() + out.entropy.square().sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.model.parameters()]))
    assert (grads[0] - grads[1]).abs().max() < 1e-10
    assert (grads[0] - grads[2]).abs().max() < 1e-10


def test_bfloat16_is_no_further_from_float32_than_the_plain_model() -> None:
    groups = random_groups([4, 4], seed=5)
    exact = language_model("llama", torch.float32, seed=2, scale=1.0)
    rough = language_model("llama", torch.bfloat16, seed=2, scale=1.0)
    truth = exact.forward(Batch(groups)).logprobs
    ours = (rough.forward(Batch(groups)).logprobs - truth).abs().mean()
    theirs = (plain(rough, groups).float() - truth).abs().mean()
    assert ours <= 1.5 * theirs


def test_a_model_that_ignores_the_layout_is_refused() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig

    from trimtab.errors import ModelError

    packed.register()
    mamba = AutoModelForCausalLM.from_config(MambaConfig(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match=r"not supported|cannot be packed"):
        LanguageModel(mamba.eval(), Template.of(tiny.tokenizer()))
