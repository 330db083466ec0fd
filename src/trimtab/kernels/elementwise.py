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


def gated(gate: Float[Tensor, "*n width"], up: Float[Tensor, "*n width"]) -> Float[Tensor, "*n width"]:
    """`swiglu` of contiguous tensors, without a gradient."""
    out = torch.empty_like(gate)
    rows, width = gate.numel() // gate.shape[-1], gate.shape[-1]
    kernels.loaded().swiglu_forward(*(kernels.address(t) for t in (gate, up)), rows, width, kernels.address(out))
    return out


def gate_gradients(gate: Float[Tensor, "*n width"], up: Float[Tensor, "*n width"], grad: Float[Tensor, "*n width"]) -> tuple[Tensor, ...]:
    """Gradients of gate and up, and once more the product: [*n, width] each."""
    found = tuple(torch.empty_like(gate) for _ in range(3))
    rows, width = gate.numel() // gate.shape[-1], gate.shape[-1]
    places = [kernels.address(t) for t in (gate, up, grad)]
    kernels.loaded().swiglu_backward(*places, rows, width, *(kernels.address(t) for t in found))
    return found


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        rows, width = x.numel() // x.shape[-1], x.shape[-1]
        out, inverse = torch.empty_like(x), torch.empty(rows)
        places = (kernels.address(x), kernels.address(weight), ctypes.c_float(eps), rows, width)
        kernels.loaded().rms_norm_forward(*places, kernels.address(out), kernels.address(inverse))
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, inverse = ctx.saved_tensors
        grad = grads[0].contiguous()
        rows, width = len(inverse), x.shape[-1]
        out = torch.empty_like(x)
        sums = torch.empty(-(-rows // _BLOCK), width) if ctx.needs_input_grad[1] else None
        places = (kernels.address(t) for t in (x, weight, inverse, grad))
        kernels.loaded().rms_norm_backward(*places, rows, width, kernels.address(out), kernels.address(sums))
        return out, None if sums is None else sums.sum(0).to(weight.dtype), None


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        return gate_gradients(gate, up, grads[0].contiguous())[:2]


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, backward=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return _turned(grads[0], *ctx.saved_tensors, backward=True), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, *, backward: bool) -> Tensor:
    x = kernels.by_token(x)
    out = torch.empty(x.shape, dtype=x.dtype)
    tables = (kernels.address(cos), kernels.address(sin))
    kernels.loaded().rotate(kernels.address(x), ctypes.c_long(x.stride(0)), *tables, *x.shape, int(backward), kernels.address(out))
    return out
