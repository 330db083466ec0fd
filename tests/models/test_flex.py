"""Attention as FlexAttention computes it on a GPU: its mask, its blocks and its result, held against the whole score matrix.

torch runs the same mask on a CPU: as a formula on the whole matrix, and compiled, by blocks, without gradients.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch
from test_attention import SIZES, whole
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask, flex_attention

from trimtab.models import attention as blocks
from trimtab.models import flex
from trimtab.models.attention import AttentionSettings
from trimtab.models.packed import Layout
from trimtab.types import Group, Prompt, Response


def groups_of(sizes: list[tuple[int, tuple[int, ...]]]) -> list[Group]:
    return [Group(Prompt((1,) * p, ""), tuple(Response((1,) * n, "") for n in answers)) for p, answers in sizes]


def inputs(n: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(n, heads, dim, dtype=dtype, generator=torch.Generator().manual_seed(i)) for i, heads in enumerate((6, 2, 2, 6))]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's reference of FlexAttention on whole matrices. It has gradients on a CPU too, once torch is kept from refusing them."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_WARNINGS_SHOWN", {"flex_attention_performance"})
    monkeypatch.setattr(flex, "_kernel", lambda: flex_attention)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_it_is_the_whole(sizes: str, window: int | None, softcap: float | None) -> None:
    groups = groups_of(SIZES[sizes])
    layout, settings = Layout.of(groups, keep_last=True), AttentionSettings(0.3, window, softcap)
    q, k, v, pull = inputs(len(layout.input_ids), 5, torch.float64)
    found = []
    for attend in (
        lambda *x: flex.attention(*x, layout.plan.sights, settings.scale, window, softcap),
        lambda *x: whole(groups, *x, settings),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attend(*leaves)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, pull)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)


def long_groups() -> list[Group]:
    draw = random.Random(0)
    return groups_of([(draw.randint(1, 400), tuple(draw.randint(1, 400) for _ in range(draw.randint(0, 4)))) for _ in range(6)])


@pytest.mark.parametrize("window", [None, 100])
def test_its_blocks_hold_what_is_seen(window: int | None) -> None:
    layout = Layout.of(long_groups(), keep_last=True)
    sights = layout.plan.sights
    n = len(sights.own)
    assert n >= len(layout.input_ids)
    assert n % flex.BLOCK == 0
    mask = sights.mask(window)
    seen = create_mask(mask.mask_mod, None, None, n, n, device="cpu")[0, 0]
    by_block = seen.view(n // flex.BLOCK, flex.BLOCK, n // flex.BLOCK, flex.BLOCK).transpose(1, 2)
    computed = mask.to_dense()[0, 0].bool()
    some, whole_of = by_block.any(-1).any(-1), by_block.all(-1).all(-1)
    assert bool((computed >= some).all()), "a block that somebody sees is left out"
    if window is None:
        assert torch.equal(computed, some), "a block that nobody sees is computed"
        full = torch.zeros_like(computed)
        for row, count in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
            full[row, mask.full_kv_indices[0, 0, row, :count]] = True
        assert torch.equal(full, whole_of)
        assert full.any()
    else:
        assert int(mask.full_kv_num_blocks.sum()) == 0


def test_rooms_are_few_and_little_larger() -> None:
    for n in range(1, 20_000, 37):
        assert n <= flex.room(n) <= max(n + flex.BLOCK, 1.25 * n)
    assert len({flex.room(n) for n in range(4097, 8193)}) == 4


def test_compiled_by_blocks_it_is_the_whole() -> None:
    groups = long_groups()
    layout, settings = Layout.of(groups, keep_last=True), AttentionSettings(0.125, None, None)
    q, k, v, _ = inputs(len(layout.input_ids), 64, torch.float32)
    with torch.no_grad():
        ours = flex.attention(q, k, v, layout.plan.sights, settings.scale, None, None)
    assert torch.allclose(ours, whole(groups, q, k, v, settings), atol=1e-5)


class TestHeldAgainstTheProducts:
    """What decides whether it is used."""

    @pytest.fixture(autouse=True)
    def _afresh(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flex, "_agreed", {})
        monkeypatch.setattr(flex, "usable", lambda query: True)

    def attended(self, monkeypatch: pytest.MonkeyPatch, kernel: Any) -> tuple[Tensor, int]:
        """What the layer's attention gives, and how often FlexAttention was asked."""
        calls = []

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(args)
            return kernel(*args, **options)

        monkeypatch.setattr(flex, "_kernel", lambda: counted)
        layout = Layout.of(groups_of(SIZES["pairs"]), keep_last=True)
        q, k, v, _ = inputs(len(layout.input_ids), 32, torch.float32)
        return blocks.attention(q, k, v, layout.plan, AttentionSettings(0.3, 4, 0.7)), len(calls)

    def right(self) -> Tensor:
        q, k, v, _ = inputs(70, 32, torch.float32)
        return whole(groups_of(SIZES["pairs"]), q, k, v, AttentionSettings(0.3, 4, 0.7))

    @pytest.mark.usefixtures("uncompiled")
    def test_it_serves_where_it_agrees(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="FlexAttention does not serve")
            out, calls = self.attended(monkeypatch, flex_attention)
        assert calls == 2  # the probe and the layer
        assert torch.allclose(out, self.right(), atol=1e-5)

    @pytest.mark.usefixtures("uncompiled")
    @pytest.mark.parametrize("fault", ["raises", "ignores the mask", "NaN"])
    def test_products_serve_where_it_does_not(self, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
        def kernel(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("no kernel image is available\nfor this device")
            if fault == "NaN":
                return flex_attention(q, k, v, **options) * float("nan")
            return flex_attention(q, k, v, **{**options, "block_mask": None})

        with pytest.warns(UserWarning, match="RuntimeError: no kernel image is available\\)|its values differ by"):
            out, calls = self.attended(monkeypatch, kernel)
        assert calls == 1
        assert torch.allclose(out, self.right(), atol=1e-5)
