"""AdamW over float32 values, gradient clipping, and learning rates that are a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from trimtab.config import Config
from trimtab.errors import NumericalError, RunError
from trimtab.kernels import adamw
from trimtab.models.scratch import Scratch


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

    The values that are stepped are float32 (or float64) also where parameters are bfloat16: updates smaller than a bfloat16 step
    are not lost. Gradients of all micro-batches are added up in float32 as backward produces them, so many small micro-batches lose
    nothing against a large one; the sums are in reach of the model as `parameter.main_grad`: layers, embedding and head add to them
    themselves.

    Where there are kernels, a bfloat16 parameter is the upper half of its value (`halves`); elsewhere it is a rounded copy of a master.

    scratch: where gradients are added up, for optimisers that step in different updates; else the optimiser has its own.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, total_steps: int, scratch: Scratch | None = None
    ) -> None:
        self.config, self.total_steps = config, total_steps
        self.lr_factor = 1.0  # lowered by guards after a spike
        self.parameters = dict(parameters)
        self.scratch = scratch or Scratch(self.parameters)
        self.sums = self.scratch.gradients(self.parameters)
        self.halves = {name: adamw.Halves(p, self.sums[name]) for name, p in self.parameters.items() if adamw.serves(p)}
        self.masters = {name: _master(p, self.sums.get(name)) for name, p in self.parameters.items() if name not in self.halves}
        self.copies = {name: master for name, master in self.masters.items() if master is not self.parameters[name]}
        for name, sums in self.sums.items():
            self.parameters[name].main_grad = sums  # type: ignore[attr-defined]
            self.parameters[name].register_post_accumulate_grad_hook(_adder(sums))
        self.adam = self._adam(list(self.masters.values())) if self.masters else None

    def _adam(self, masters: list[Tensor]) -> torch.optim.AdamW:
        fused = all(m.dtype == torch.float32 for m in masters)
        return torch.optim.AdamW(masters, lr=self.config.lr, **self._rule(), fused=fused)

    def _rule(self) -> dict[str, Any]:
        return {"betas": self.config.betas, "eps": self.config.eps, "weight_decay": self.config.weight_decay}

    def lr(self, at: int) -> float:
        """The learning rate at a position of the schedule."""
        return self.lr_factor * learning_rate(self.config, at, self.total_steps)

    @torch.no_grad()
    def grad_norm(self) -> float:
        """The global norm of the gradients gathered so far. Raises NumericalError if there are none."""
        grads = self.gradients()
        if not grads:
            raise NumericalError("no parameter received a gradient", fix="nothing to train: check model.lora and the data")
        stepped = {id(half.grad) for half in self.halves.values()}
        others = [gradient for gradient in grads if id(gradient) not in stepped]
        norm = float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(others)).double())) if others else 0.0
        return math.hypot(adamw.norm(list(self.halves.values())), norm) if self.halves else norm

    @torch.no_grad()
    def step(self, at: int, norm: float) -> None:
        """Clip gradients of this norm, step, and clear them. at: the position in the learning-rate schedule."""
        lr, scale = self.lr(at), min(1.0, self.config.max_grad_norm / norm) if norm else 1.0
        if self.halves:
            adamw.step(list(self.halves.values()), scale=scale, lr=lr, **self._rule())
        if self.adam is not None:
            if scale < 1:
                torch._foreach_mul_([master.grad for master in self.masters.values() if master.grad is not None], scale)
            for group in self.adam.param_groups:
                group["lr"] = lr
            self.adam.step()
        for name, master in self.copies.items():
            self.parameters[name].copy_(master)
            self.sums[name].zero_()  # those of halves are
        self._forget()

    def weights(self) -> dict[str, Tensor]:
        """The values that are stepped, by parameter."""
        return {name: self.halves[name].weight() if name in self.halves else self.masters[name].detach() for name in self.parameters}

    def state_dict(self) -> dict[str, Any]:
        """The values that are stepped and Adam's moments by parameter, and the steps taken."""
        states = {name: self._moments(name) for name in self.parameters}
        moments = {moment: {name: state[moment] for name, state in states.items() if state} for moment in ("exp_avg", "exp_avg_sq", "step")}
        return {"weights": self.weights(), **moments}

    def _moments(self, name: str) -> dict[str, Tensor]:
        if name in self.halves:
            half = self.halves[name]
            said = {"exp_avg": half.exp_avg, "exp_avg_sq": half.exp_avg_sq, "step": torch.tensor(float(half.steps))}
            return said if half.steps else {}
        return dict(self.adam.state.get(self.masters[name], {})) if self.adam is not None else {}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over values and moments. Raises RunError if they are those of other parameters."""
        shapes = {name: tuple(parameter.shape) for name, parameter in self.parameters.items()}
        if shapes != {name: tuple(weight.shape) for name, weight in state["weights"].items()}:
            raise RunError("the checkpoint holds other parameters than the model trains", fix="resume with the recipe it was made with")
        for name, half in self.halves.items():
            half.take(state["weights"][name])
            half.steps = int(state["step"].get(name, 0))
            for mine, moment in ((half.exp_avg, "exp_avg"), (half.exp_avg_sq, "exp_avg_sq")):
                mine.copy_(state[moment][name]) if half.steps else mine.zero_()
        for name, master in self.masters.items():
            master.copy_(state["weights"][name])
            if name in self.copies:
                self.parameters[name].copy_(master)
            assert self.adam is not None
            if name in state["step"]:
                self.adam.state[master] = {
                    "step": state["step"][name].clone(),
                    **{moment: state[moment][name].to(master.device, copy=True) for moment in ("exp_avg", "exp_avg_sq")},
                }
            else:  # a checkpoint of before the first step
                self.adam.state.pop(master, None)

    def gradients(self) -> list[Tensor]:
        """What has been gathered so far."""
        found = (self.sums.get(name, parameter.grad) for name, parameter in self.parameters.items())
        return [gradient for gradient in found if gradient is not None]

    def zero_grad(self) -> None:
        """Forget the gradients gathered so far."""
        for sums in self.sums.values():
            sums.zero_()
        self._forget()

    def _forget(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None


def _master(parameter: nn.Parameter, sums: Tensor | None) -> Tensor:
    """What is stepped in a parameter's stead: itself, or a float32 copy with the sum of its gradients."""
    if sums is None:
        return parameter
    master = parameter.detach().float()
    master.grad = sums
    return master


def _adder(sums: Tensor) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        if parameter.grad is not None:  # else it was added to main_grad already
            sums.add_(parameter.grad)
            parameter.grad = None

    return add
