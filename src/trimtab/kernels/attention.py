"""Attention over a packed batch in bfloat16, forward and backward, without padding or stored scores."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab import kernels


@dataclass(frozen=True)
class Sequences:
    """Groups as the kernel reads them: group g is the sequences first[g] .. first[g + 1] - 1, its prompt before its responses.

    Groups with the most scores come first: work is handed out in this order.
    """

    first: Int[Tensor, " groups_and_one"]
    starts: Int[Tensor, " sequences"]
    lengths: Int[Tensor, " sequences"]

    @classmethod
    def of(cls, spans: Sequence[tuple[int, int, Sequence[tuple[int, int]]]]) -> Sequences:
        """spans: where each prompt starts, its length, and the same of its responses."""

        def scores(span: tuple[int, int, Sequence[tuple[int, int]]]) -> int:
            _, prompt, answers = span
            return prompt * prompt + sum(n * (n + 2 * prompt) for _, n in answers)

        first, starts, lengths = [0], [], []
        for start, prompt, answers in sorted(spans, key=scores, reverse=True):
            for place, length in ((start, prompt), *((place, n) for place, n in answers if n)):
                starts.append(place)
                lengths.append(length)
            first.append(len(starts))
        return cls(*(torch.tensor(x, dtype=torch.int32) for x in (first, starts, lengths)))


class Problem(ctypes.Structure):
    """`Attention` of parts.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v")),
        *((f"{name}_stride", ctypes.c_long) for name in ("q", "k", "v")),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "kv", "dim", "groups")),
        *((name, ctypes.c_void_p) for name in ("first", "starts", "lengths")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int),
    )


Settings = tuple[float, int | None, float | None]
"""Scale of the scores, sliding window, tanh soft cap of the scores (None: without)."""


def usable(query: Float[Tensor, "n heads dim"]) -> bool:
    """Whether the kernel can read these queries."""
    return query.shape[-1] % 16 == 0 and kernels.serves(query)


def attention(
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    sequences: Sequences,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Float[Tensor, "n heads dim"]:
    """softmax(scale q k^T + mask) v; scores and sums in float32."""
    return _Attention.apply(query, key, value, sequences, (scale, window, softcap))  # type: ignore[no-any-return, no-untyped-call]


def forward(
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    sequences: Sequences,
    settings: Settings,
) -> tuple[Float[Tensor, "n heads dim"], Float[Tensor, "heads n"]]:
    """Attention without a gradient, of tensors with a token's heads side by side; and the log of each query's sum of exp(scores)."""
    out, lse = torch.empty(query.shape, dtype=query.dtype), torch.empty(query.shape[1], query.shape[0])
    asked = problem(query, key, value, sequences, settings)
    kernels.checked(kernels.loaded().attention_forward(ctypes.byref(asked), kernels.address(out), kernels.address(lse)))
    return out, lse


def gradients(
    grad: Float[Tensor, "n heads dim"],
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    lse: Float[Tensor, "heads n"],
    sequences: Sequences,
    settings: Settings,
) -> list[Tensor]:
    """Gradients of query, key and value."""
    found = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    asked = problem(query, key, value, sequences, settings)
    stride, places = ctypes.c_long(grad.stride(0)), [kernels.address(x) for x in (lse, *found)]
    kernels.checked(kernels.loaded().attention_backward(ctypes.byref(asked), kernels.address(grad), stride, *places))
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, settings: Settings) -> Tensor:
        query, key, value = (kernels.by_token(x) for x in (query, key, value))
        out, lse = forward(query, key, value, sequences, settings)
        ctx.save_for_backward(query, key, value, lse)
        ctx.seen = sequences, settings
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return (*gradients(kernels.by_token(grads[0]), *ctx.saved_tensors, *ctx.seen), None, None)


def problem(q: Tensor, k: Tensor, v: Tensor, s: Sequences, settings: Settings) -> Problem:
    """Attention as the kernels read it; it lives no longer than these tensors."""
    scale, window, softcap = settings
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], len(s.first) - 1)
    arrays = (kernels.address(x) for x in (s.first, s.starts, s.lengths))
    places = (*(x.data_ptr() for x in (q, k, v)), *(x.stride(0) for x in (q, k, v)))
    return Problem(*places, *sizes, *arrays, scale, softcap or 0.0, window or 0)
