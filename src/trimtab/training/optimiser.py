"""AdamW over float32 master weights, gradient clipping, and learning rates that are a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.config import Config
from trimtab.errors import NumericalError, RunError


class OptimConfig(Config):
    """How weights are changed."""

    lr: float = Field(1e-5, gt=0, description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("linear", description="shape after warm-up; linear and cosine end at 0")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises from 0")
    betas: tuple[float, float] = Field((0.9, 0.999), description="AdamW moment decay")
    eps: float = Field(1e-8, gt=0, description="AdamW epsilon")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is scaled down to this global norm")


def learning_rate(config: OptimConfig, step: int, total: int) -> float:
    """The learning rate of optimiser step `step` (from 0) of `total`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    done = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    return config.lr * ((1 - done) if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))


class Optimiser:
    """Steps a set of named parameters.

    Parameters in bfloat16 get a float32 master copy: gradients of all micro-batches are added up in float32 as backward
    produces them, the step is taken on the masters, and the rounded result is copied back. So many small micro-batches
    lose nothing against one large one, and updates smaller than a bfloat16 step are not lost. The sums are in reach of the model as
    `parameter.main_grad`: the embedding and the head add to it themselves.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, total_steps: int) -> None:
        self.config, self.total_steps = config, total_steps
        self.lr_factor = 1.0  # lowered by guards after a spike
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                master = parameter.detach().float()
                master.grad = torch.zeros_like(master)
                parameter.main_grad = master.grad  # type: ignore[attr-defined]
                parameter.register_post_accumulate_grad_hook(_adder(master))
                self.masters[name] = master
            else:
                self.masters[name] = parameter
        fused = all(m.dtype == torch.float32 for m in self.masters.values())
        self.adam = torch.optim.AdamW(
            list(self.masters.values()), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=fused
        )

    def lr(self, at: int) -> float:
        """The learning rate at a position of the schedule."""
        return self.lr_factor * learning_rate(self.config, at, self.total_steps)

    @torch.no_grad()
    def grad_norm(self) -> float:
        """The global norm of the gradients gathered so far. Raises NumericalError if there are none."""
        grads = self.gradients()
        if not grads:
            raise NumericalError("no parameter received a gradient", fix="nothing to train: check model.lora and the data")
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).double()))

    @torch.no_grad()
    def step(self, at: int, norm: float) -> None:
        """Clip gradients of this norm, step, and clear them. at: the position in the learning-rate schedule."""
        if norm > self.config.max_grad_norm:
            torch._foreach_mul_(self.gradients(), self.config.max_grad_norm / norm)
        for group in self.adam.param_groups:
            group["lr"] = self.lr(at)
        self.adam.step()
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        self.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Master weights and Adam's moments by parameter, and the steps taken."""
        states = {name: self.adam.state.get(master, {}) for name, master in self.masters.items()}
        moments = {moment: {name: state[moment] for name, state in states.items() if state} for moment in ("exp_avg", "exp_avg_sq", "step")}
        return {"weights": {name: master.detach() for name, master in self.masters.items()}, **moments}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over weights and moments. Raises RunError if they are those of other parameters."""
        shapes = {name: tuple(master.shape) for name, master in self.masters.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in state["weights"].items()}:
            raise RunError("the checkpoint holds other parameters than the model trains", fix="resume with the recipe it was made with")
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            master.copy_(state["weights"][name])
            if master is not parameter:
                parameter.copy_(master)
            if name in state["step"]:
                self.adam.state[master] = {
                    "step": state["step"][name].clone(),
                    **{moment: state[moment][name].to(master.device, copy=True) for moment in ("exp_avg", "exp_avg_sq")},
                }
            else:  # a checkpoint of before the first step
                self.adam.state.pop(master, None)

    def gradients(self) -> list[Tensor]:
        """What has been gathered so far."""
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        for name, parameter in self.parameters.items():
            master, parameter.grad = self.masters[name], None
            if master is not parameter and master.grad is not None:
                master.grad.zero_()


def _adder(master: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if master.grad is None or parameter.grad is None:  # what was added to main_grad already
            return
        master.grad += parameter.grad
        parameter.grad = None

    return add
