"""The matrix products of linear layers in bfloat16, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab import kernels
from trimtab.kernels import elementwise


def usable(weight: Float[Tensor, "out in"]) -> bool:
    """Whether there are kernels for a layer with this weight."""
    return kernels.serves(weight) and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0 and weight.is_contiguous()


def linear(x: Float[Tensor, "*n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*n out"]:
    """x W^T + b. Where the weight carries `main_grad` (see training.optimiser) its gradient is added there, and autograd hears of none."""
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def forward(
    x: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None, out: Float[Tensor, "rows out"]
) -> Float[Tensor, "rows out"]:
    """out = x W^T + b"""
    bias = None if bias is None else bias.float()
    places = (kernels.address(t) for t in (x, weight, bias))
    kernels.checked(kernels.loaded().linear_forward(*places, *_sizes(x, weight), kernels.address(out)))
    return out


def input_gradient(grad: Float[Tensor, "rows out"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "rows in"]:
    """g W"""
    found = grad.new_empty(len(grad), weight.shape[1])
    places = (kernels.address(t) for t in (grad, weight))
    kernels.checked(kernels.loaded().linear_input(*places, *_sizes(grad, weight), kernels.address(found)))
    return found


def add_weight_gradient(grad: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"], sums: Float[Tensor, "out in"]) -> None:
    """sums += g^T x, in float32"""
    places = (kernels.address(t) for t in (grad, x))
    kernels.checked(kernels.loaded().linear_weight(*places, *_sizes(x, sums), kernels.address(sums)))


def _sizes(rows: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return len(rows), weight.shape[1], weight.shape[0]


def gated_linear(
    gate: Float[Tensor, "*n in"], up: Float[Tensor, "*n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*n out"]:
    """(gate * sigmoid(gate) * up) W^T + b. The gated input is made again in the backward pass, not kept."""
    return _GatedLinear.apply(gate, up, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.sink, ctx.shape = getattr(weight, "main_grad", None), x.shape
        return forward(rows, weight, bias, x.new_empty(len(rows), len(weight))).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, weight = ctx.saved_tensors
        grad = grads[0].reshape(len(rows), len(weight)).contiguous()
        by_weight, by_bias = _parameter_gradients(ctx, grad, rows, weight, *ctx.needs_input_grad[1:])
        by_x = input_gradient(grad, weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return by_x, by_weight, by_bias


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        gate_rows, up_rows = (x.reshape(-1, x.shape[-1]).contiguous() for x in (gate, up))
        ctx.save_for_backward(gate_rows, up_rows, weight)
        ctx.sink, ctx.shape = getattr(weight, "main_grad", None), gate.shape
        inner = elementwise.gated(gate_rows, up_rows)
        return forward(inner, weight, bias, gate.new_empty(len(inner), len(weight))).view(*gate.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        gate, up, weight = ctx.saved_tensors
        grad = grads[0].reshape(len(gate), len(weight)).contiguous()
        by_gate, by_up, inner = elementwise.gate_gradients(gate, up, input_gradient(grad, weight))
        by_weight, by_bias = _parameter_gradients(ctx, grad, inner, weight, *ctx.needs_input_grad[2:])
        return by_gate.view(ctx.shape), by_up.view(ctx.shape), by_weight, by_bias


def _parameter_gradients(
    ctx: Any, grad: Tensor, rows: Tensor, weight: Tensor, by_weight: bool, by_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """What autograd is told of weight and bias: nothing of a weight whose gradient is added to its `main_grad`."""
    found: Tensor | None = None
    if by_weight:
        sums = torch.zeros(weight.shape) if ctx.sink is None else ctx.sink
        add_weight_gradient(grad, rows, sums)
        found = sums.to(weight.dtype) if ctx.sink is None else None
    return found, grad.float().sum(0).to(weight.dtype) if by_bias else None
