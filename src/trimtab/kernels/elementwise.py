"""What stands between the matrix products of a layer, in bfloat16: RMS norm, gated SiLU, rotary embedding."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab import kernels

_BLOCK = 32  # rows whose gradients elementwise.cpp adds up together


def rms_norm(x: Float[Tensor, "*n width"], weight: Float[Tensor, " width"], eps: float) -> Float[Tensor, "*n width"]:
    """x / sqrt(mean(x^2) + eps) * weight. The width is a multiple of 16."""
    return _Norm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


def swiglu(gate: Float[Tensor, "*n width"], up: Float[Tensor, "*n width"]) -> Float[Tensor, "*n width"]:
    """gate * sigmoid(gate) * up. The width is a multiple of 16."""
    return _Gate.apply(gate, up)  # type: ignore[no-any-return, no-untyped-call]


def rotate(x: Float[Tensor, "n heads dim"], cos: Float[Tensor, "n dim"], sin: Float[Tensor, "n dim"]) -> Float[Tensor, "n heads dim"]:
    """x cos + (-b, a) sin, where x = (a, b) in halves: the rotary embedding. The dimension is a multiple of 32."""
    return _Rotation.apply(x, cos, sin)  # type: ignore[no-any-return, no-untyped-call]


def norm(x: Float[Tensor, "rows width"], weight: Float[Tensor, " width"], eps: float) -> tuple[Tensor, Float[Tensor, " rows"]]:
    """`rms_norm` of contiguous rows without a gradient, and what each row was multiplied by before the weight."""
    out, inverse = torch.empty_like(x), torch.empty(len(x))
    places = (kernels.address(x), kernels.address(weight), ctypes.c_float(eps), *x.shape)
    kernels.loaded().rms_norm_forward(*places, kernels.address(out), kernels.address(inverse))
    return out, inverse


def norm_gradients(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, " width"],
    inverse: Float[Tensor, " rows"],
    grad: Float[Tensor, "rows width"],
    plus: Float[Tensor, "rows width"] | None,
    by_weight: bool,
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, " width"] | None]:
    """plus + the gradient of the input of `norm`, and that of the weight if it is wanted, in float32."""
    out = torch.empty_like(x)
    sums = torch.empty(-(-len(x) // _BLOCK), x.shape[1]) if by_weight else None
    places = (kernels.address(t) for t in (x, weight, inverse, grad, plus))
    kernels.loaded().rms_norm_backward(*places, *x.shape, kernels.address(out), kernels.address(sums))
    return out, None if sums is None else sums.sum(0)


def gated(gate: Float[Tensor, "rows width"], up: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
    """`swiglu` of contiguous rows without a gradient."""
    out = torch.empty_like(gate)
    kernels.loaded().swiglu_forward(*(kernels.address(t) for t in (gate, up)), *gate.shape, kernels.address(out))
    return out


def gate_gradients(
    gate: Float[Tensor, "rows width"], up: Float[Tensor, "rows width"], grad: Float[Tensor, "rows width"]
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "rows width"]]:
    """Gradients of gate and up."""
    found = torch.empty_like(gate), torch.empty_like(gate)
    places = [kernels.address(t) for t in (gate, up, grad)]
    kernels.loaded().swiglu_backward(*places, *gate.shape, *(kernels.address(t) for t in (*found, None)))
    return found


def turned(
    x: Float[Tensor, "n heads dim"],
    cos: Float[Tensor, "n dim"],
    sin: Float[Tensor, "n dim"],
    *,
    backward: bool = False,
) -> Float[Tensor, "n heads dim"]:
    """`rotate` without a gradient, or its transpose."""
    x = kernels.by_token(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    tables = (kernels.address(cos), kernels.address(sin))
    kernels.loaded().rotate(kernels.address(x), ctypes.c_long(x.stride(0)), *tables, *x.shape, int(backward), kernels.address(out))
    return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows, weight = x.reshape(-1, x.shape[-1]).contiguous(), weight.contiguous()
        out, inverse = norm(rows, weight, eps)
        ctx.save_for_backward(rows, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, weight, inverse = ctx.saved_tensors
        by_x, by_weight = norm_gradients(rows, weight, inverse, grads[0].reshape(rows.shape).contiguous(), None, ctx.needs_input_grad[1])
        return by_x.view(grads[0].shape), None if by_weight is None else by_weight.to(weight.dtype), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gates, ups = (x.reshape(-1, x.shape[-1]).contiguous() for x in (gate, up))
        ctx.save_for_backward(gates, ups)
        return gated(gates, ups).view(gate.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gates, ups = ctx.saved_tensors
        return tuple(x.view(grads[0].shape) for x in gate_gradients(gates, ups, grads[0].reshape(gates.shape).contiguous()))


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return turned(grads[0], *ctx.saved_tensors, backward=True), None, None
