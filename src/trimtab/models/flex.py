"""Attention over a packed batch on a GPU: torch's FlexAttention, with the mask as a formula and only the blocks that somebody sees.

A token q of a packed sequence sees two runs of keys, own[q] .. q of its own sequence and begin[q] .. end[q] - 1 of its prompt, so that the
mask is four numbers a token, and which blocks of keys a block of queries needs follows from them without the mask ever being written down.
Before its first use on a device it is held against the batched products of `models.attention`, which serve where it cannot.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from trimtab.models.blocks import Span

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens of a block of queries or keys."""


@dataclass
class Sights:
    """Which keys each of `room` places of a packed sequence of n tokens sees; places from n on are padding and see themselves.

    position: a token's place in its own (prompt, response), which a sliding window counts in.
    """

    own: Int[Tensor, " room"]
    begin: Int[Tensor, " room"]
    end: Int[Tensor, " room"]
    position: Int[Tensor, " room"]
    masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @classmethod
    def of(cls, spans: Sequence[Span], tokens: int, device: torch.device | str) -> Sights:
        own, begin, end, position = torch.arange(room(tokens)).repeat(4, 1)
        begin.zero_()
        end.zero_()
        for start, length, answers in spans:
            own[start : start + length] = start
            position[start : start + length] = torch.arange(length)
            for first, count in answers:
                response = slice(first, first + count)
                position[response] = torch.arange(length, length + count)
                if first == start + length:  # right behind its prompt: one run
                    own[response] = start
                else:
                    own[response], begin[response], end[response] = first, start, start + length
        return cls(*(x.to(device) for x in (own, begin, end, position)))

    def sees(self, window: int | None) -> Callable[..., Tensor]:
        """The mask as FlexAttention asks for it: of (batch, head, query, key), whether the query sees the key."""
        own, begin, end, position = self.own, self.begin, self.end, self.position

        def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            shown = ((own[q] <= k) & (k <= q)) | ((begin[q] <= k) & (k < end[q]))
            return shown if window is None else shown & (position[q] - position[k] < window)

        return seen

    def blocks(self) -> tuple[Bool[Tensor, "queries keys"], Bool[Tensor, "queries keys"]]:
        """For blocks of queries and of keys: does anybody see any of it, and does everybody see all of it (without a window)?

        Tokens against blocks of keys, 1 / BLOCK of the mask; a window only hides more.
        """
        q = torch.arange(len(self.own), device=self.own.device)[:, None]
        first = q[::BLOCK].T
        last = first + BLOCK - 1
        own, begin, end = self.own[:, None], self.begin[:, None], self.end[:, None]
        some = ((own <= last) & (first <= q)) | ((begin <= last) & (first < end))
        whole = ((own <= first) & (last <= q)) | ((begin <= first) & (last < end))
        count = first.shape[1]
        return some.view(count, BLOCK, count).any(1), whole.view(count, BLOCK, count).all(1)

    def mask(self, window: int | None) -> BlockMask:
        """The blocks to compute; all layers with the same window share it."""
        if window not in self.masks:
            from torch.nn.attention.flex_attention import BlockMask

            some, whole = self.blocks()
            whole = whole & (window is None)
            part = some & ~whole
            size = len(self.own), len(self.own)
            self.masks[window] = BlockMask.from_kv_blocks(
                *_listed(part), *_listed(whole), BLOCK_SIZE=BLOCK, mask_mod=self.sees(window), seq_lengths=size
            )
        return self.masks[window]


def room(tokens: int) -> int:
    """Tokens and padding: few different sizes, because torch may compile for each: a multiple of a quarter of the last power of two."""
    step = max(BLOCK, 1 << max(0, (tokens - 1).bit_length() - 3))
    return -(-tokens // step) * step


def _listed(kind: Bool[Tensor, "queries keys"]) -> tuple[Tensor, Tensor]:
    """For every row how many are true, [1, 1, queries], and the numbers of the true ones first, in order, [1, 1, queries, keys]."""
    order = kind.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return kind.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]


def usable(query: Float[Tensor, "n heads dim"]) -> bool:
    """Whether these queries are on a device for which torch makes a kernel, in a precision that it has."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16, torch.float32)


def attention(
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    sights: Sights,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Tensor, "n heads dim"]:
    """softmax(scale q k^T + mask) v; scores and sums in float32."""
    tokens, missing = len(query), len(sights.own) - len(query)
    q, k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing)).transpose(0, 1)[None] for x in (query, key, value))
    capped = None if softcap is None else _capped(softcap)
    shared = query.shape[1] != key.shape[1]
    out: Tensor = _kernel()(q, k, v, score_mod=capped, block_mask=sights.mask(window), scale=scale, enable_gqa=shared)
    return out[0, :, :tokens].transpose(0, 1)


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    def score(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score


@cache
def _kernel() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


Exact = Callable[[Tensor, Tensor, Tensor, list[Span]], Tensor]
"""Attention of query, key and value of the packed sequence of some groups, as it is known to be right."""

_PROBE: list[Span] = [(0, 50, [(50, 70), (120, 9)]), (129, 90, [(219, 60)])]
_agreed: dict[tuple[object, ...], bool] = {}


def agrees(query: Float[Tensor, "n heads dim"], kv: int, window: int | None, softcap: float | None, exact: Exact) -> bool:
    """Does it give what `exact` gives, forward and backward, for queries like these? Asked once for each sort, and told if not."""
    sort = query.device, query.dtype, query.shape[1:], kv, window, softcap
    if sort not in _agreed:
        fault = _disagreement(query, kv, window, softcap, exact)
        _agreed[sort] = fault is None
        if fault is not None:
            warnings.warn(f"FlexAttention does not serve here ({fault}): batched matrix products instead, which are slower", stacklevel=2)
    return _agreed[sort]


def _disagreement(query: Tensor, kv: int, window: int | None, softcap: float | None, exact: Exact) -> str | None:
    """What is wrong with it, on two small groups."""
    tokens, (heads, dim) = 279, query.shape[1:]
    sights, scale = Sights.of(_PROBE, tokens, query.device), dim**-0.5
    made = torch.Generator().manual_seed(0)
    *inputs, pull = (torch.randn(tokens, h, dim, generator=made).to(query.device, query.dtype) for h in (heads, kv, kv, heads))

    def found(attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = attend(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, pull)]

    try:
        ours = found(lambda q, k, v: attention(q, k, v, sights, scale, window, softcap))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"
    right = found(lambda q, k, v: exact(q, k, v, _PROBE))
    for name, a, b in zip(("values", "gradients of queries", "gradients of keys", "gradients of values"), ours, right, strict=True):
        distance = float((a.double() - b.double()).norm() / b.double().norm())
        if not distance < _TOLERANCE:
            return f"its {name} differ by {distance:.1%}"
    return None


_TOLERANCE = 0.02
"""Relative, in norm: rounding of bfloat16 is 0.3 % here, a wrong key ten times that."""
