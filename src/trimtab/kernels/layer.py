"""A whole layer of a Llama-like trunk over a packed batch in bfloat16: forward and backward in a few calls.

    u = x + O attend(R Q n(x), R K n(x), V n(x)),    y = u + D (silu(G m(u)) * U m(u)),    n, m: RMS norms, R: rotary embedding

The same as its parts one by one, but what lies between them costs nothing: sums are added while products are made, layers that read the
same rows are taken together, and of a token are kept only x, the turned queries and keys, the values, what attention gives, u, G m(u)
and U m(u). Norms and the gated product are made again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.kernels import attention, elementwise, products
from trimtab.kernels.attention import Sequences

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [n, heads, dim], keys and values [n, kv_heads, dim] -> [n, heads, dim], without a gradient."""


class Parameters(NamedTuple):
    """The weights of a layer: projections [out, in] with their biases, norms [width] or [dim]. Biases and the last two may be missing."""

    before: Tensor
    query: Tensor
    query_bias: Tensor | None
    key: Tensor
    key_bias: Tensor | None
    value: Tensor
    value_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    between: Tensor
    gate: Tensor
    gate_bias: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None


@dataclass(frozen=True)
class Setting:
    """Epsilons of the norms before attention, before the gate, and of queries and keys; a head's dimension; scale, window, soft cap."""

    before_eps: float
    between_eps: float
    head_eps: float
    dim: int
    attention: attention.Settings


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


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, seen: Sequences | Attend, setting: Setting, learning: bool, *parameters: Any
    ) -> Tensor:
        p, dim = Parameters(*parameters), setting.dim
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        read, _ = elementwise.norm(rows, p.before, setting.before_eps)
        projected = products.outputs(read, (p.query, p.key, p.value), (p.query_bias, p.key_bias, p.value_bias))
        raw = q, k, v = [y.view(len(rows), -1, dim) for y in projected]
        if p.query_norm is not None and p.key_norm is not None:
            q, k = (_by_head(y, w, setting.head_eps) for y, w in ((q, p.query_norm), (k, p.key_norm)))
        q, k = (elementwise.turned(y, cos, sin, out=y) for y in (q, k))
        lse: Tensor | None = None
        if isinstance(seen, Sequences):
            attended, lse = attention.forward(q, k, v, seen, setting.attention)
        else:
            attended = seen(q, k, v)
        attended = attended.reshape(len(rows), -1)
        (u,) = products.outputs(attended, (p.out,), (p.out_bias,), rows)
        read, _ = elementwise.norm(u, p.between, setting.between_eps)
        gate = up = None
        if learning:
            gate, up = products.outputs(read, (p.gate, p.up), (p.gate_bias, p.up_bias))
            inner = elementwise.gated(gate, up)
        else:
            inner = products.gated(read, (p.gate, p.up), (p.gate_bias, p.up_bias))
        (y,) = products.outputs(inner, (p.down,), (p.down_bias,), u)
        unturned = raw[:2] if p.query_norm is not None else (None, None)
        ctx.save_for_backward(rows, cos, sin, q, k, v, lse, attended, u, gate, up, *unturned, *parameters)
        ctx.seen, ctx.setting, ctx.shape = seen, setting, x.shape
        ctx.sinks = Parameters._make(getattr(w, "main_grad", None) for w in parameters)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, cos, sin, q, k, v, lse, attended, u, gate, up, raw_q, raw_k, *parameters = ctx.saved_tensors
        p, setting = Parameters(*parameters), ctx.setting
        learn = _Learnt(p, Parameters(*ctx.needs_input_grad[6:]), ctx.sinks)
        grad = grads[0].reshape(rows.shape).contiguous()

        inner = products.input_gradient([grad], [p.down])
        by_gate, by_up = elementwise.gate_gradients(gate, up, inner, again=True)
        learn.linear(inner, down=grad)
        read, inverse = elementwise.norm(u, p.between, setting.between_eps)
        learn.linear(read, gate=by_gate, up=by_up)
        by_u = learn.norm("between", u, inverse, products.input_gradient([by_gate, by_up], [p.gate, p.up]), grad)

        learn.linear(attended, out=by_u)
        by_attended = products.input_gradient([by_u], [p.out]).view(q.shape)
        by_q, by_k, by_v = attention.gradients(by_attended, q, k, v, lse, ctx.seen, setting.attention)
        by_q, by_k = (elementwise.turned(g, cos, sin, backward=True, out=g) for g in (by_q, by_k))
        if p.query_norm is not None:
            by_q, by_k = (learn.head_norm(*which, setting.head_eps) for which in (("query_norm", raw_q, by_q), ("key_norm", raw_k, by_k)))
        flat = [g.view(len(rows), -1) for g in (by_q, by_k, by_v)]
        read, inverse = elementwise.norm(rows, p.before, setting.before_eps)
        learn.linear(read, query=flat[0], key=flat[1], value=flat[2])
        by_x = learn.norm("before", rows, inverse, products.input_gradient(flat, [p.query, p.key, p.value]), by_u)
        return by_x.view(ctx.shape), None, None, None, None, None, *(learn.found.get(name) for name in Parameters._fields)


class _Learnt:
    """Gradients of a layer's parameters, where they are wanted: added to their sinks, or `found` for autograd."""

    def __init__(self, parameters: Parameters, wanted: Parameters, sinks: Parameters) -> None:
        self.parameters, self.wanted, self.sinks = (values._asdict() for values in (parameters, wanted, sinks))
        self.found: dict[str, Tensor | None] = {}

    def linear(self, x: Tensor, **grads: Tensor) -> None:
        """Of the projections that read x, by name."""
        weights, sinks = ([values[name] for name in grads] for values in (self.parameters, self.sinks))
        wanted = [(self.wanted[name], self.wanted[f"{name}_bias"]) for name in grads]
        said = products.parameter_gradients(list(grads.values()), x, weights, sinks, wanted)
        for name, found in zip(grads, said, strict=True):
            self.found[name], self.found[f"{name}_bias"] = found

    def norm(self, name: str, x: Tensor, inverse: Tensor, grad: Tensor, plus: Tensor | None) -> Tensor:
        """Returns plus + the gradient of x."""
        weight, sink = self.parameters[name], self.sinks[name]
        by_x, by_weight = elementwise.norm_gradients(x, weight, inverse, grad, plus, self.wanted[name])
        if by_weight is not None and sink is not None:
            sink.add_(by_weight)
        elif by_weight is not None:
            self.found[name] = by_weight.to(weight.dtype)
        return by_x

    def head_norm(self, name: str, x: Tensor, grad: Tensor, eps: float) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        _, inverse = elementwise.norm(rows, self.parameters[name], eps)
        return self.norm(name, rows, inverse, grad.view(rows.shape), None).view(x.shape)


def _by_head(x: Float[Tensor, "n heads dim"], weight: Float[Tensor, " dim"], eps: float) -> Float[Tensor, "n heads dim"]:
    return elementwise.norm(x.view(-1, x.shape[-1]), weight, eps)[0].view(x.shape)
