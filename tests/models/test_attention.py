"""Attention in blocks is attention: against the whole score matrix with its mask, values and gradients, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from trimtab.models import attention as blocks
from trimtab.models.attention import AttentionSettings
from trimtab.models.packed import Layout
from trimtab.types import Group, Prompt, Response

SIZES = {
    "pairs": [(7, (5, 9)), (3, (2, 2)), (11, (1, 30))],
    "a group": [(6, (4, 9, 1, 9, 3, 80, 2, 60))],
    "ragged": [(1, (3,)), (40, (2, 1)), (2, (50, 1, 1)), (5, ()), (9, (33,))],
}


def whole(groups: list[Group], q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings) -> Tensor:
    """softmax over everything a token may see, with masks written down token by token."""
    place: list[tuple[int, int, int]] = []  # group, response (-1: prompt), position
    for g, group in enumerate(groups):
        start = len(group.prompt.tokens)
        place += [(g, -1, i) for i in range(start)]
        place += [(g, s, start + i) for s, r in enumerate(group.responses) for i in range(len(r.tokens))]

    def sees(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
        near = settings.window is None or a[2] - b[2] < settings.window
        return a[0] == b[0] and b[1] in (-1, a[1]) and b[2] <= a[2] and near

    seen = torch.tensor([[sees(a, b) for b in place] for a in place])
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * settings.scale
    if settings.softcap is not None:
        scores = settings.softcap * torch.tanh(scores / settings.softcap)
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize(("tokens", "scores"), [(256, 2**23), (8, 2**23), (8, 50)])
def test_blocks_are_the_whole(
    sizes: str, window: int | None, softcap: float | None, tokens: int, scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "QUERY_TOKENS", tokens)
    monkeypatch.setattr(blocks, "SCORES", scores)
    groups = [Group(Prompt((1,) * p, ""), tuple(Response((1,) * n, "") for n in answers)) for p, answers in SIZES[sizes]]
    layout, settings = Layout.of(groups, keep_last=True), AttentionSettings(0.3, window, softcap)
    n = len(layout.input_ids)
    q, k, v, pull = (
        torch.randn(n, heads, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i, heads in enumerate((6, 2, 2, 6))
    )
    found, right = [], []
    for out, attend in ((found, lambda *x: blocks.attention(*x, layout.plan, settings)), (right, lambda *x: whole(groups, *x, settings))):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves)
        (y * pull).sum().backward()
        out += [y.detach(), *(x.grad for x in leaves)]
    for ours, theirs in zip(found, right, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def test_little_is_computed_on_padding() -> None:
    draw = random.Random(0)
    sizes = [(draw.randint(30, 300), [draw.randint(20, 300) for _ in range(2)]) for _ in range(8)]
    groups = [Group(Prompt((1,) * p, ""), tuple(Response((1,) * n, "") for n in answers)) for p, answers in sizes]
    real = sum(p * p + sum(n * (p + n) for n in answers) for p, answers in sizes)
    made = 0
    for block in Layout.of(groups, keep_last=True).plan.blocks:
        g, p = block.prompts.shape
        made += g * p * p + sum(part.numel() * (p + part.shape[2]) for part in block.parts)
    assert made < 1.25 * real
