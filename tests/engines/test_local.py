"""Generation samples from the policy it says it samples from."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from trimtab.batch import Batch
from trimtab.data.templates import Template
from trimtab.engines.decoder import Decoder
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig, draw, inverse_cdf
from trimtab.errors import DataError
from trimtab.models import loading
from trimtab.models.language import LanguageModel
from trimtab.types import Prompt

PROMPTS = [Prompt(tokens, "") for tokens in ((5, 9, 30), (7,), (11, 12, 13, 14, 15, 16, 17), (40, 41))]


def engine(architecture: str = "llama", rows: int = 64, dtype: torch.dtype = torch.float64, **sampling: object) -> LocalEngine:
    model = LanguageModel(tiny.model(architecture, dtype, scale=1.5), Template.of(tiny.tokenizer()))
    return LocalEngine(model, SamplingConfig(**{"max_tokens": 12, **sampling}), EngineConfig(rows=rows))


def raise_eos(engine: LocalEngine, by: float) -> None:
    """Make EOS (token 0) likely, so that rows finish at different times."""
    head = torch.nn.Linear(32, tiny.VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(engine.model.head.weight)
        head.bias.zero_()
        head.bias[0] = by
    engine.model.plain.set_output_embeddings(head)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_logprobs_equal_the_trainers(architecture: str, temperature: float) -> None:
    sampler = engine(architecture, temperature=temperature)
    groups = sampler.generate(PROMPTS, 3, seed=1)
    recomputed = sampler.model.forward(Batch(tuple(groups)), temperature=temperature).logprobs
    sampled = torch.tensor([p for g in groups for r in g.responses for p in r.logprobs])
    assert (recomputed - sampled).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_responses_do_not_depend_on_their_company(rows: int) -> None:
    alone, wide = engine(rows=rows), engine(rows=64)
    for e in (alone, wide):
        raise_eos(e, 3.0)
    a, b = (e.generate(PROMPTS, 4, seed=3) for e in (alone, wide))
    assert [[r.tokens for r in g.responses] for g in a] == [[r.tokens for r in g.responses] for g in b]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("rows", [4, 7, 64])
def test_rows_that_finish_leave_and_the_rest_is_right(architecture: str, rows: int) -> None:
    sampler = engine(architecture, rows=rows, max_tokens=70)
    raise_eos(sampler, 3.0)
    groups = sampler.generate(PROMPTS, 6, seed=0)
    lengths = {len(r.tokens) for g in groups for r in g.responses}
    assert len(lengths) > 4
    assert all(r.truncated == (r.tokens[-1] != 0) and 0 not in r.tokens[:-1] for g in groups for r in g.responses)
    recomputed = sampler.model.forward(Batch(tuple(groups))).logprobs
    assert (recomputed - torch.tensor([p for g in groups for r in g.responses for p in r.logprobs])).abs().max() < 1e-5


def watch(engine: LocalEngine) -> tuple[list[int], list[int]]:
    """Tokens of every decoding step, and of every pass that reads prompts."""
    steps: list[int] = []
    reads: list[int] = []
    stepper, hidden = engine.stepper(), engine.model.hidden

    def stepped(tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        steps.append(len(tokens))
        return Decoder.hidden(stepper, tokens, *others)

    def read(tokens: torch.Tensor, *others: Any) -> torch.Tensor:
        reads.append(len(tokens))
        return hidden(tokens, *others)

    stepper.hidden, engine.model.hidden = stepped, read  # type: ignore[method-assign]
    return steps, reads


def test_every_prompt_is_read_once_and_every_token_but_the_last_once() -> None:
    sampler = engine(rows=16)
    raise_eos(sampler, 3.0)
    steps, reads = watch(sampler)
    groups = sampler.generate(PROMPTS * 5, 4, seed=0)
    assert sum(reads) == sum(len(g.prompt.tokens) for g in groups)
    assert sum(steps) == sum(len(r.tokens) - 1 for g in groups for r in g.responses)


def test_the_batch_stays_full_while_prompts_wait() -> None:
    sampler = engine(rows=16, max_tokens=40)
    raise_eos(sampler, 3.0)
    steps, _ = watch(sampler)
    prompts = PROMPTS * 30
    groups = sampler.generate(prompts, 4, seed=0)
    longest = max(len(r.tokens) for g in groups for r in g.responses)
    assert sum(steps) > 0.75 * 16 * (len(steps) - longest)  # a wave would wait for its longest response again and again
    waves = [max(len(r.tokens) for g in groups[i : i + 4] for r in g.responses) for i in range(0, len(groups), 4)]
    assert len(steps) < 0.7 * sum(waves)


def test_same_seed_same_responses_other_seed_others() -> None:
    sampler = engine()
    a, b, c = (sampler.generate(PROMPTS, 2, seed=seed) for seed in (1, 1, 2))
    assert a == b
    assert a != c


def test_an_engine_that_has_slept_holds_no_weights_and_answers_as_before() -> None:
    sampler = engine()
    before, weights = sampler.generate([Prompt((5, 9), "")], 4, seed=1), weakref.ref(sampler.stepper())
    sampler.sleep()
    gc.collect()
    assert weights() is None
    assert sampler.generate([Prompt((5, 9), "")], 4, seed=1) == before


def test_temperature_zero_is_the_most_probable_token() -> None:
    sampler = engine(temperature=0)
    (group,) = sampler.generate(PROMPTS[:1], 1, seed=0)
    tokens = list(PROMPTS[0].tokens)
    with loading.plain_attention(sampler.model.plain) as model:
        for token in group.responses[0].tokens:
            assert token == int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(token)


def test_frequencies_match_the_policy() -> None:
    logits = torch.tensor([[0.0, 1.0, -2.0, 0.5]], dtype=torch.float64)
    n = 40_000
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.manual_seed(0))
    tokens, logprobs = draw(logits.expand(n, -1), uniform, SamplingConfig())
    p = torch.softmax(logits[0], -1)
    counts = torch.bincount(tokens, minlength=4) / n
    assert ((counts - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()
    assert torch.allclose(logprobs, p.log()[tokens])


def test_top_p_and_top_k_leave_out_the_tail() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(2000, -1)
    uniform = torch.rand(2000, dtype=torch.float64, generator=torch.manual_seed(0))
    assert set(draw(logits, uniform, SamplingConfig(top_p=0.75))[0].tolist()) == {0, 1}
    assert set(draw(logits, uniform, SamplingConfig(top_k=3))[0].tolist()) == {0, 1, 2}
    assert set(draw(logits, uniform, SamplingConfig(top_p=0.01))[0].tolist()) == {0}


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 700), st.floats(0, 1, exclude_max=True), st.integers(0, 2**20))
def test_inverse_cdf_is_the_definition_and_never_picks_zero_weight(n: int, u: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(n, dtype=torch.float64, generator=generator) * (torch.rand(n, generator=generator) > 0.5)
    weights[int(torch.randint(n, (1,), generator=generator))] = 1.0
    index = int(inverse_cdf(weights[None], torch.tensor([u], dtype=torch.float64))[0])
    assert weights[index] > 0
    before = float(weights[:index].sum())
    assert before <= u * float(weights.sum()) + 1e-9
    assert u * float(weights.sum()) <= before + float(weights[index]) + 1e-9


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(DataError, match="context of 256"):
        engine().generate([Prompt((5,) * 250, "")], 1, seed=0)
