"""AdamW on bfloat16 weights whose float32 value is kept in two halves: 16 bytes a weight, and one pass over them a step."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import kernels


class Halves:
    """A parameter, the sum of its gradients, and what AdamW knows of it.

    A float32 number is its nearest bfloat16 (ties away from zero) and 16 more bits. The first is the model's own parameter, the others
    are `lower`, so that no second copy of the weights is held, and no update is too small to count.
    """

    def __init__(self, parameter: nn.Parameter, grad: Float[Tensor, ...]) -> None:
        self.parameter, self.grad = parameter, grad
        self.lower = torch.zeros(parameter.shape, dtype=torch.int16)
        self.exp_avg, self.exp_avg_sq = (torch.zeros(parameter.shape) for _ in range(2))
        self.steps = 0

    def weight(self) -> Float[Tensor, ...]:
        """The float32 value: a new tensor."""
        return joined(self.parameter.detach(), self.lower)

    def take(self, weight: Float[Tensor, ...]) -> None:
        """Be this float32 value."""
        upper, lower = split(weight)
        self.parameter.detach().copy_(upper)
        self.lower.copy_(lower)


class _Weights(ctypes.Structure):
    """`Weights` of adamw.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("upper", "lower", "grad", "m", "v")),
        ("count", ctypes.c_long), ("rate", ctypes.c_float), ("root", ctypes.c_float),
    )  # fmt: skip


def step(halves: Sequence[Halves], *, scale: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One step of AdamW (Loshchilov and Hutter 2019) on `scale` times the gradients, which are then zero."""
    said = [(lr / (1 - betas[0] ** (half.steps + 1)), (1 - betas[1] ** (half.steps + 1)) ** 0.5) for half in halves]
    rule = (ctypes.c_float * 6)(scale, 1 - betas[0], betas[1], 1 - betas[1], 1 - lr * weight_decay, eps)
    kernels.checked(kernels.loaded().adamw_step(_weights(halves, said), len(halves), rule))
    for half in halves:
        half.steps += 1
        torch.autograd.graph.increment_version(half.parameter)


def norm(halves: Sequence[Halves]) -> float:
    """The global norm of the gradients."""
    found = ctypes.c_double()
    kernels.checked(kernels.loaded().adamw_squares(_weights(halves, [(0.0, 0.0)] * len(halves)), len(halves), ctypes.byref(found)))
    return math.sqrt(found.value)


def _weights(halves: Sequence[Halves], rates: Sequence[tuple[float, float]]) -> ctypes.Array[_Weights]:
    tensors = ((half.parameter, half.lower, half.grad, half.exp_avg, half.exp_avg_sq) for half in halves)
    places = ([x.data_ptr() for x in of] for of in tensors)
    rows = zip(halves, places, rates, strict=True)
    return (_Weights * len(halves))(*(_Weights(*place, half.lower.numel(), *rate) for half, place, rate in rows))


def serves(parameter: Tensor) -> bool:
    """Whether a parameter can be stepped in halves."""
    return kernels.serves(parameter) and parameter.is_contiguous()


def joined(upper: Float[Tensor, "*n"], lower: Int[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The float32 number of two halves."""
    return (upper.view(torch.int16).int().mul_(2**16)).add_(lower).view(torch.float32)


def split(weight: Float[Tensor, "*n"]) -> tuple[Float[Tensor, "*n"], Int[Tensor, "*n"]]:
    """The nearest bfloat16 of float32 numbers, and the bits that are left (signed)."""
    bits = weight.contiguous().view(torch.int32)
    return ((bits + 2**15) >> 16).to(torch.int16).view(torch.bfloat16), bits.to(torch.int16)
