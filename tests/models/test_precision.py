"""In bfloat16, losses and gradients are no further from float32 than those of the plain transformers model in bfloat16."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from trimtab.batch import Batch
from trimtab.data.templates import Template
from trimtab.models import fused, loading
from trimtab.models.language import LanguageModel, plain_logprobs
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.types import Group, Prompt, Response


def groups(vocabulary: int, count: int, longest: int) -> tuple[Group, ...]:
    draw = random.Random(0)

    def tokens() -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(draw.randint(longest // 4, longest)))

    return tuple(Group(Prompt(tokens(), ""), tuple(Response(tokens(), "") for _ in range(2))) for _ in range(count))


def nll(logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    return -logprobs.mean()


def dpo(logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    sums = torch.stack([part.sum() for part in logprobs.split(list(lengths))])
    return -nn.functional.logsigmoid(0.1 * (sums[::2] - sums[1::2])).mean()


def plain(model: LanguageModel, rows: tuple[Group, ...]) -> Tensor:
    with loading.plain_attention(model.plain) as whole:
        return torch.cat([plain_logprobs(whole, g.prompt.tokens, r.tokens) for g in rows for r in g.responses])


def gradients(model: LanguageModel) -> Tensor:
    """All of them in one float32 vector, from wherever the optimiser gathers them."""
    return torch.cat([(p.main_grad if p.grad is None else p.grad.float()).flatten() for p in model.model.parameters()])


def measured(made: Callable[[torch.dtype], LanguageModel], rows: tuple[Group, ...], loss: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Log-probabilities and gradients: ours in bfloat16, the plain model in bfloat16 and in float32."""
    lengths = [len(r.tokens) for g in rows for r in g.responses]
    found = {}
    for name, dtype, ours in (("ours", torch.bfloat16, True), ("plain", torch.bfloat16, False), ("exact", torch.float32, False)):
        model = made(dtype)
        Optimiser(model.trainable(), OptimConfig(), 1)  # gradients of both are added up in float32
        logprobs = model.forward(Batch(rows)).logprobs if ours else plain(model, rows)
        assert logprobs is not None
        loss(logprobs.float(), lengths).backward()
        found[name] = logprobs.detach().float(), gradients(model)
    return found


def compared(found: dict[str, tuple[Tensor, Tensor]]) -> list[float]:
    """Our distance from float32 over the plain model's: of log-probabilities, of gradients."""
    exact = found["exact"]
    return [float((a - c).norm() / (b - c).norm()) for a, b, c in zip(found["ours"], found["plain"], exact, strict=True)]


@pytest.mark.parametrize("loss", [nll, dpo])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2"])
def test_no_further_from_float32_than_plain_bfloat16(architecture: str, loss: Any) -> None:
    shape = {"head_dim": 32} if architecture == "llama" else {}  # large enough for every kernel
    weights = tiny.model(architecture, torch.bfloat16, **shape).state_dict()

    def made(dtype: torch.dtype) -> LanguageModel:
        model = tiny.model(architecture, dtype, **shape)
        model.load_state_dict(weights)
        fused.take_kernels(model)
        return LanguageModel(model, Template.of(tiny.tokenizer()))

    logprobs, grads = compared(measured(made, groups(tiny.VOCABULARY, 6, 40), loss))
    assert logprobs < 1.1
    assert grads < 1.1


@pytest.mark.slow
@pytest.mark.parametrize("loss", [nll, dpo])
def test_no_further_from_float32_on_the_default_model(loss: Any) -> None:
    def made(dtype: torch.dtype) -> LanguageModel:
        return LanguageModel.load(loading.ModelConfig(dtype="bfloat16" if dtype == torch.bfloat16 else "float32"))

    found = compared(measured(made, groups(40_000, 3, 120), loss))
    print(f"distance from float32 over that of plain bfloat16: log-probabilities {found[0]:.2f}, gradients {found[1]:.2f}")
    assert max(found) < 1.0
