"""The matrix products of linear layers in bfloat16, forward and backward. Layers that read the same rows are taken together."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab import kernels


class Linear(ctypes.Structure):
    """`Linear` of parts.h."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("weight", "bias", "rows", "sums")), ("out", ctypes.c_int))


def usable(weight: Float[Tensor, "out in"]) -> bool:
    """Whether there are kernels for a layer with this weight."""
    return kernels.serves(weight) and weight.shape[0] % 16 == 0 and weight.shape[1] % 16 == 0 and weight.is_contiguous()


def linear(x: Float[Tensor, "*n in"], weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "*n out"]:
    """x W^T + b. Where the weight carries `main_grad` (see training.optimiser) its gradient is added there, and autograd hears of none."""
    return _Linear.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def forward(
    x: Float[Tensor, "rows in"],
    weights: Sequence[Float[Tensor, "_ in"]],
    biases: Sequence[Float[Tensor, " _"] | None],
    outs: Sequence[Float[Tensor, "rows _"]],
    plus: Float[Tensor, "rows _"] | None = None,
) -> None:
    """out_l = x W_l^T + b_l + plus for every layer l."""
    whole = [None if bias is None else bias.float() for bias in biases]
    layers = layers_of(outs, weights=weights, biases=whole)
    kernels.checked(kernels.loaded().linear_forward(kernels.address(x), *x.shape, layers, len(layers), kernels.address(plus)))


def outputs(
    x: Float[Tensor, "rows in"],
    weights: Sequence[Float[Tensor, "_ in"]],
    biases: Sequence[Float[Tensor, " _"] | None],
    plus: Float[Tensor, "rows _"] | None = None,
) -> list[Float[Tensor, "rows _"]]:
    """x W_l^T + b_l + plus for every layer l."""
    outs = [x.new_empty(len(x), len(weight)) for weight in weights]
    forward(x, weights, biases, outs, plus)
    return outs


def input_gradient(grads: Sequence[Float[Tensor, "rows _"]], weights: Sequence[Float[Tensor, "_ in"]]) -> Float[Tensor, "rows in"]:
    """sum_l g_l W_l"""
    found = grads[0].new_empty(len(grads[0]), weights[0].shape[1])
    layers = layers_of(grads, weights=weights)
    kernels.checked(kernels.loaded().linear_input(layers, len(layers), *found.shape, kernels.address(found)))
    return found


def add_weight_gradients(
    grads: Sequence[Float[Tensor, "rows _"]], x: Float[Tensor, "rows in"], sums: Sequence[Float[Tensor, "_ in"]]
) -> None:
    """sums_l += g_l^T x for every layer l, in float32."""
    layers = layers_of(grads, sums=sums)
    kernels.checked(kernels.loaded().linear_weight(layers, len(layers), kernels.address(x), *x.shape))


def layers_of(
    rows: Sequence[Tensor | None],
    *,
    weights: Sequence[Tensor] | None = None,
    biases: Sequence[Tensor | None] | None = None,
    sums: Sequence[Tensor] | None = None,
) -> Any:
    """Layers as the kernels read them, of which each needs a part."""

    def place(tensors: Sequence[Tensor | None] | None, i: int) -> int | None:
        tensor = None if tensors is None else tensors[i]
        return None if tensor is None else tensor.data_ptr()

    outs = [len(weight) for weight in weights or sums or ()]
    return (Linear * len(rows))(*(Linear(*(place(kind, i) for kind in (weights, biases, rows, sums)), out) for i, out in enumerate(outs)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.save_for_backward(rows, weight)
        ctx.sink, ctx.shape = getattr(weight, "main_grad", None), x.shape
        (out,) = outputs(rows, [weight], [bias])
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (rows, weight), (by_x, by_weight, by_bias) = ctx.saved_tensors, ctx.needs_input_grad
        grad = grads[0].reshape(len(rows), len(weight)).contiguous()
        sums = (torch.zeros(weight.shape) if ctx.sink is None else ctx.sink) if by_weight else None
        if sums is not None:
            add_weight_gradients([grad], rows, [sums])
        return (
            input_gradient([grad], [weight]).view(ctx.shape) if by_x else None,
            None if sums is None or ctx.sink is not None else sums.to(weight.dtype),
            grad.float().sum(0).to(weight.dtype) if by_bias else None,
        )
