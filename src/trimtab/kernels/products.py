"""The matrix products of linear layers in bfloat16, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab import kernels


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
        found: Tensor | None = None
        if ctx.needs_input_grad[1]:
            sums = torch.zeros(weight.shape) if ctx.sink is None else ctx.sink
            add_weight_gradient(grad, rows, sums)
            found = sums.to(weight.dtype) if ctx.sink is None else None
        by_x = input_gradient(grad, weight).view(ctx.shape) if ctx.needs_input_grad[0] else None
        by_bias = grad.float().sum(0).to(weight.dtype) if ctx.needs_input_grad[2] else None
        return by_x, found, by_bias
