"""The one update: micro-batches by token budget, one reduction by global counts, one optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab.batch import Batch, Counts, LossFunction, Outputs
from trimtab.errors import NumericalError
from trimtab.training.optimiser import Optimiser


def update(
    batch: Batch,
    forward: Callable[[Batch], Outputs],
    loss: LossFunction,
    optimisers: Sequence[Optimiser],
    *,
    at: int,
    token_budget: int,
) -> dict[str, float]:
    """One optimiser step on a minibatch; returns its metrics, `loss` and `grad_norm` (of the first optimiser) among them.

    at: the position in the learning-rate schedule.

    The result does not depend on how the minibatch is cut into micro-batches of at most `token_budget` packed tokens.
    Raises NumericalError, with no weight changed, when a loss or a gradient is not finite.
    """
    try:
        means, maxima = _gather(batch, forward, loss, token_budget)
        norms = [optimiser.grad_norm() for optimiser in optimisers]
    except BaseException:
        for optimiser in optimisers:
            optimiser.zero_grad()
        raise
    for optimiser, norm in zip(optimisers, norms, strict=True):
        optimiser.step(at, norm)
    return {name: float(value) for name, value in {**means, **maxima}.items()} | {"grad_norm": norms[0]}


def _gather(
    batch: Batch, forward: Callable[[Batch], Outputs], loss: LossFunction, token_budget: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and metrics of a minibatch, micro-batch by micro-batch."""
    counts = Counts.of(batch)
    means: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}
    for micro in batch.micro_batches(token_budget):
        part = loss(forward(micro), micro, counts)
        value = part.value.detach()
        if not torch.isfinite(value):
            raise NumericalError(f"the loss is {float(value)}; the step was not taken", where=_where(micro), fix="lower the learning rate")
        part.value.backward()
        for name, term in {**part.means, "loss": value}.items():
            means[name] = means.get(name, torch.zeros(())) + term.detach()
        for name, term in part.maxima.items():
            maxima[name] = torch.maximum(maxima[name], term.detach()) if name in maxima else term.detach()
    return means, maxima


def _where(batch: Batch) -> str:
    shown = " | ".join(f"{g.prompt.as_text[:40]!r} -> {g.responses[0].text[:40]!r}" for g in batch.groups[:3])
    return f"micro-batch of {len(batch.groups)} groups: {shown}"
