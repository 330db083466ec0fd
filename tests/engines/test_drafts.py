"""Earlier responses save time and change nothing that is sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tiny
from trimtab.batch import Batch
from trimtab.data.templates import Template
from trimtab.engines.drafts import agreed, uniform_numbers
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.models.language import LanguageModel
from trimtab.types import Group, Prompt, Response

PROMPTS = [Prompt(tokens, "") for tokens in ((5, 9, 30), (7,), tuple(range(11, 51)), (40, 41))]


def engine(architecture: str = "llama", rows: int = 64, reuse: bool = False, eos_bias: float = 2.5, **sampling: Any) -> LocalEngine:
    made = tiny.model(architecture, torch.float64, scale=1.5)
    biased = torch.nn.Linear(32, tiny.VOCABULARY, dtype=torch.float64)
    biased.weight.data = made.get_output_embeddings().weight.data.clone()
    biased.bias.data.zero_()[0] = eos_bias
    made.set_output_embeddings(biased)
    model = LanguageModel(made, Template.of(tiny.tokenizer()))
    return LocalEngine(model, SamplingConfig(**{"max_tokens": 12, **sampling}), EngineConfig(rows=rows, reuse=reuse))


def tokens(groups: list[Group]) -> list[list[tuple[int, ...]]]:
    return [[r.tokens for r in g.responses] for g in groups]


def logprobs(groups: list[Group]) -> torch.Tensor:
    return torch.tensor([p for g in groups for r in g.responses for p in r.logprobs or ()])


def spoiled(groups: list[Group]) -> list[list[tuple[int, ...]]]:
    """Drafts of every kind: right, wrong somewhere, cut short, going on after their end, of one token, missing."""
    generator = torch.Generator().manual_seed(7)

    def spoil(k: int, draft: tuple[int, ...]) -> tuple[int, ...]:
        place = int(torch.randint(len(draft), (1,), generator=generator))
        wrong = (*draft[:place], 1 + (draft[place] + 3) % 100, *draft[place + 1 :])
        return (draft, wrong, draft[: place + 1], (*draft, 9, 9, 9) * 2, (3,), ())[k % 6]

    return [[spoil(i + k, r.tokens) for k, r in enumerate(g.responses)][: 7 - i] for i, g in enumerate(groups)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("rows", [4, 11, 64])
def test_whatever_a_draft_says_the_responses_are_the_same(architecture: str, rows: int) -> None:
    sampler = engine(architecture, rows=rows)
    uniform = uniform_numbers([1, 2, 3, 4], 7, 12)
    plain = sampler.sample(PROMPTS, 7, uniform)
    drafted = sampler.sample(PROMPTS, 7, uniform, spoiled(plain))
    assert tokens(drafted) == tokens(plain)
    assert [[r.truncated for r in g.responses] for g in drafted] == [[r.truncated for r in g.responses] for g in plain]
    assert (logprobs(drafted) - logprobs(plain)).abs().max() < 1e-9
    recomputed = sampler.model.forward(Batch(tuple(drafted))).logprobs
    assert (recomputed - logprobs(drafted)).abs().max() < 1e-6


def test_an_unchanged_policy_needs_no_step_and_a_changed_one_some() -> None:
    sampler = engine(reuse=True)
    first = sampler.generate(PROMPTS, 4, seed=1)
    steps: list[int] = []
    stepper = sampler.stepper()
    step = stepper.hidden
    stepper.hidden = lambda new, *others: steps.append(len(new)) or step(new, *others)  # type: ignore[method-assign,func-returns-value]
    assert tokens(sampler.generate(PROMPTS, 4, seed=2)) == tokens(first)
    assert steps == []
    with torch.no_grad():
        sampler.model.plain.get_output_embeddings().weight.mul_(1.05)
    second = sampler.generate(PROMPTS, 4, seed=3)
    fresh = engine()
    with torch.no_grad():
        fresh.model.plain.get_output_embeddings().weight.mul_(1.05)
    assert tokens(second) != tokens(first)
    assert tokens(second) == tokens(fresh.sample(PROMPTS, 4, uniform_numbers(sampler.memory.recall(PROMPTS, 0)[0], 4, 12)))


def test_the_same_prompt_twice_in_a_call_draws_two_groups() -> None:
    sampler = engine(reuse=True)
    for seed in (0, 1):
        a, b = sampler.generate([PROMPTS[0], PROMPTS[0]], 3, seed=seed)
        assert a.responses != b.responses


def test_a_draft_holds_up_to_the_first_difference_or_eos() -> None:
    eos = frozenset({0})
    assert agreed([4, 5, 6], [4, 5, 6], eos) == 3
    assert agreed([4, 5, 6], [4, 7, 6], eos) == 1
    assert agreed([9], [4], eos) == 0
    assert agreed([4, 0, 6], [4, 0, 6], eos) == 2
    assert agreed([], [], eos) == 0


# Five tokens and at most two of them: 21 responses whose probabilities can be written down.
FEW = torch.tensor([0, 10, 11, 12, 13])
COUNT = 6000


def toy(shift: float) -> tuple[LocalEngine, list[tuple[int, ...]], torch.Tensor]:
    """An engine, all responses it can give to PROMPTS[0], and their probabilities."""
    sampler = engine(rows=2000, max_tokens=2)
    head = sampler.model.plain.get_output_embeddings()
    with torch.no_grad():
        head.bias.fill_(-1e4)
        head.bias[FEW] = torch.tensor([0.0, 1.0, 0.5, -0.5, 0.0], dtype=torch.float64) + shift * torch.arange(5.0, dtype=torch.float64)
    outcomes = [(0,), *((a, b) for a in FEW.tolist() if a for b in FEW.tolist())]
    group = Group(PROMPTS[0], tuple(Response(o, "") for o in outcomes))
    batch = Batch((group,))
    logps = sampler.model.forward(batch).logprobs
    assert logps is not None
    probabilities = batch.sum_by_response(logps.detach()).exp()
    assert abs(float(probabilities.sum()) - 1) < 1e-9
    return sampler, outcomes, probabilities


def chi_square(seen: list[tuple[int, ...]], outcomes: list[tuple[int, ...]], probabilities: torch.Tensor) -> float:
    counts = torch.bincount(torch.tensor([outcomes.index(o) for o in seen]), minlength=len(outcomes))
    expected = probabilities * len(seen)
    assert expected.min() > 4
    return float(((counts - expected) ** 2 / expected).sum())


LIMIT = 45.3
"""The 99.9 % point of chi-square with 20 degrees of freedom."""


@pytest.fixture(scope="module")
def drawn() -> dict[str, Any]:
    """Responses of an old policy, and of a new one that starts from them: with the same random numbers and with fresh ones."""
    old, outcomes, _ = toy(0.0)
    new, _, probabilities = toy(0.25)
    numbers = {name: uniform_numbers([seed], COUNT, 2) for name, seed in (("coupled", 1), ("fresh", 2))}
    drafts = tokens(old.sample(PROMPTS[:1], COUNT, numbers["coupled"]))
    said = {name: tokens(new.sample(PROMPTS[:1], COUNT, uniform, drafts))[0] for name, uniform in numbers.items()}
    return {"outcomes": outcomes, "probabilities": probabilities, "drafts": drafts[0], **said}


@pytest.mark.parametrize("numbers", ["coupled", "fresh"])
def test_responses_from_drafts_have_the_new_policys_distribution(drawn: dict[str, Any], numbers: str) -> None:
    assert chi_square(drawn["drafts"], drawn["outcomes"], drawn["probabilities"]) > 2 * LIMIT  # the policies do differ
    assert chi_square(drawn[numbers], drawn["outcomes"], drawn["probabilities"]) < LIMIT


def test_given_the_draft_only_fresh_numbers_draw_from_the_policy(drawn: dict[str, Any]) -> None:
    """What the module's description says of common random numbers, and what it does not promise."""
    for name, holds in (("fresh", True), ("coupled", False)):
        given = [said for said, draft in zip(drawn[name], drawn["drafts"], strict=True) if draft[0] == 10]
        assert (chi_square(given, drawn["outcomes"], drawn["probabilities"]) < LIMIT) == holds
