"""AdamW on bfloat16 weights whose float32 value is kept in two halves: 16 bytes a weight, and one pass over them a step."""

from __future__ import annotations

import ctypes

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

    def step(self, *, scale: float, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        """One step of AdamW (Loshchilov and Hutter 2019) on `scale` times the gradient, which is then zero."""
        self.steps += 1
        rate, root = lr / (1 - betas[0] ** self.steps), (1 - betas[1] ** self.steps) ** 0.5
        places = (kernels.address(x.detach()) for x in (self.parameter, self.lower, self.grad, self.exp_avg, self.exp_avg_sq))
        numbers = (scale, 1 - betas[0], betas[1], 1 - betas[1], 1 - lr * weight_decay, rate, root, eps)
        kernels.loaded().adamw_step(*places, ctypes.c_long(self.lower.numel()), *map(ctypes.c_float, numbers))
        torch.autograd.graph.increment_version(self.parameter)

    def weight(self) -> Float[Tensor, ...]:
        """The float32 value: a new tensor."""
        return joined(self.parameter.detach(), self.lower)

    def take(self, weight: Float[Tensor, ...]) -> None:
        """Be this float32 value."""
        upper, lower = split(weight)
        self.parameter.detach().copy_(upper)
        self.lower.copy_(lower)


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
