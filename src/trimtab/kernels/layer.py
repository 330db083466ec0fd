"""A whole layer of a Llama-like trunk over a packed batch in bfloat16: forward and backward in a call each.

    u = x + O attend(R Q n(x), R K n(x), V n(x)),    y = u + D (silu(G m(u)) * U m(u)),    n, m: RMS norms, R: rotary embedding

The same as its parts one by one, but what lies between them costs nothing: sums are added while products are made, layers that read the
same rows are taken together, and of a token are kept only x, the turned queries and keys, the values, what attention gives, u, G m(u)
and U m(u). Norms and the gated product are made again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab import kernels
from trimtab.kernels.attention import Problem, Sequences, Settings, problem
from trimtab.kernels.products import Linear

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [n, heads, dim], keys and values [n, kv_heads, dim] -> [n, heads, dim], without a gradient."""


class Parameters(NamedTuple):
    """The weights of a layer: projections [out, in] with their biases, norms [width] or [dim]. Biases and the last two may be missing."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor
    query_bias: Tensor | None
    key_bias: Tensor | None
    value_bias: Tensor | None
    out_bias: Tensor | None
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    before: Tensor
    between: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self[:7]

    @property
    def biases(self) -> tuple[Tensor | None, ...]:
        return self[7:14]

    @property
    def norms(self) -> tuple[Tensor | None, ...]:
        return self[14:]


@dataclass(frozen=True)
class Setting:
    """Epsilons of the norms before attention, before the gate, and of queries and keys; a head's dimension; scale, window, soft cap."""

    before_eps: float
    between_eps: float
    head_eps: float
    dim: int
    attention: Settings


def layer(
    x: Float[Tensor, "*n width"],
    cos: Float[Tensor, "n dim"],
    sin: Float[Tensor, "n dim"],
    seen: Sequences | Attend,
    setting: Setting,
    parameters: Parameters,
) -> Float[Tensor, "*n width"]:
    """y of every token. seen: what each sees; or what attends instead, and then there is no gradient.

    Where a weight carries `main_grad` (see training.optimiser) its gradient is added there, and autograd hears of none.
    """
    return _Layer.apply(x, cos.contiguous(), sin.contiguous(), seen, setting, torch.is_grad_enabled(), *parameters)  # type: ignore[no-any-return, no-untyped-call]


class _Norm(ctypes.Structure):
    """`Norm` of layer.cpp."""

    _fields_ = (("weight", ctypes.c_void_p), ("sums", ctypes.c_void_p), ("eps", ctypes.c_float))


class Whole(ctypes.Structure):
    """`Layer` of layer.cpp."""

    _fields_ = (
        ("linear", Linear * 7), ("bias_sums", ctypes.c_void_p * 7), ("norms", _Norm * 4),
        *((name, ctypes.c_int) for name in ("rows", "width", "dim")),
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "q", "k", "attended", "lse")),
        ("seen", Problem),
    )  # fmt: skip


class _Kept(NamedTuple):
    """What a layer makes of its tokens: what comes out of the projections (None for gate and up where nothing is learnt, and for what need

    not be kept), queries and keys turned (those that came out, turned in place, where they have no norms), what attention gives, and the
    log of each query's sum."""

    query: Tensor
    key: Tensor
    value: Tensor
    u: Tensor
    gate: Tensor | None
    up: Tensor | None
    y: Tensor | None
    turned_query: Tensor
    turned_key: Tensor
    attended: Tensor
    lse: Tensor


def run(step: str, whole: Whole, *places: ctypes.c_void_p) -> None:
    """One of the steps of layer.cpp: before, after, forward, backward."""
    kernels.checked(getattr(kernels.loaded(), f"layer_{step}")(ctypes.byref(whole), *places))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, seen: Sequences | Attend, setting: Setting, learning: bool, *parameters: Any
    ) -> Tensor:
        p = Parameters(*parameters)
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        kept = _room(rows, p, setting.dim, learning)
        whole = _whole(rows, cos, sin, p, setting, kept, seen if isinstance(seen, Sequences) else None)
        if isinstance(seen, Sequences):
            run("forward", whole)
        else:
            run("before", whole)
            kept.attended.copy_(seen(kept.turned_query, kept.turned_key, kept.value).reshape(kept.attended.shape))
            run("after", whole)
        ctx.save_for_backward(rows, cos, sin, *kept._replace(y=None), *parameters)
        ctx.seen, ctx.setting, ctx.shape = seen, setting, x.shape
        ctx.sinks = [getattr(w, "main_grad", None) for w in parameters]
        assert kept.y is not None
        return kept.y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, cos, sin, *saved = ctx.saved_tensors
        kept, p = _Kept(*saved[: len(_Kept._fields)]), Parameters(*saved[len(_Kept._fields) :])
        grad, by_x = grads[0].reshape(rows.shape).contiguous(), torch.empty_like(rows)
        learning = zip(p, ctx.sinks, ctx.needs_input_grad[6:], strict=True)
        sums = [_sums(w, sink) if w is not None and wanted else None for w, sink, wanted in learning]
        whole = _whole(rows, cos, sin, p, ctx.setting, kept, ctx.seen, sums)
        run("backward", whole, kernels.address(grad), kernels.address(by_x))
        found = [None if s is None or s is sink else s.to(rows.dtype) for s, sink in zip(sums, ctx.sinks, strict=True)]
        return by_x.view(ctx.shape), None, None, None, None, None, *found


def _room(rows: Float[Tensor, "n width"], p: Parameters, dim: int, learning: bool) -> _Kept:
    """Where a layer writes what it makes of its tokens."""
    n, width = rows.shape
    q, k, v = (rows.new_empty(n, weight.shape[0] // dim, dim) for weight in (p.query, p.key, p.value))
    turned = (q, k) if p.query_norm is None else (torch.empty_like(q), torch.empty_like(k))
    gate, up = (rows.new_empty(n, weight.shape[0]) if learning else None for weight in (p.gate, p.up))
    u, y, attended = (rows.new_empty(n, size) for size in (width, width, p.query.shape[0]))
    return _Kept(q, k, v, u, gate, up, y, *turned, attended, torch.empty(q.shape[1], n))


def _whole(
    rows: Float[Tensor, "n width"],
    cos: Float[Tensor, "n dim"],
    sin: Float[Tensor, "n dim"],
    p: Parameters,
    setting: Setting,
    kept: _Kept,
    seen: Sequences | None,
    sums: Sequence[Tensor | None] = (None,) * len(Parameters._fields),
) -> Whole:
    """A layer as the kernel reads it. sums: where gradients of the parameters are added."""
    biases = [None if bias is None else bias.float() for bias in p.biases]
    each = zip(p.weights, biases, kept, sums, strict=False)
    eps = (setting.before_eps, setting.between_eps, setting.head_eps, setting.head_eps)
    whole = Whole(
        (Linear * 7)(*(Linear(*map(_place, tensors), tensors[0].shape[0]) for tensors in each)),
        (ctypes.c_void_p * 7)(*map(_place, sums[7:14])),
        (_Norm * 4)(*(_Norm(_place(w), _place(s), e) for w, s, e in zip(p.norms, sums[14:], eps, strict=True))),
        *rows.shape, setting.dim,
        *map(_place, (rows, cos, sin, kept.turned_query, kept.turned_key, kept.attended, kept.lse)),
    )  # fmt: skip
    if seen is not None:
        whole.seen = problem(kept.turned_query, kept.turned_key, kept.value, seen, setting.attention)
    whole.biases = biases  # as long as it lives
    return whole


def _sums(parameter: Tensor, sink: Tensor | None) -> Tensor:
    """Where the gradient of a parameter is added."""
    return torch.zeros(parameter.shape) if sink is None else sink


def _place(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
