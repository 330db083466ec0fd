"""The one update: micro-batches by token budget, one reduction by global counts, one optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trimtab import interrupt
from trimtab.batch import Batch, Counts, LossFunction, Outputs, join, passed
from trimtab.memory import fitted
from trimtab.training import finite
from trimtab.training.clock import Clock
from trimtab.training.optimiser import Optimiser


def update(
    batch: Batch,
    forward: Callable[[Batch], Outputs],
    loss: LossFunction,
    optimisers: Sequence[Optimiser],
    *,
    at: int,
    token_budget: int,
    clock: Clock | None = None,
) -> dict[str, float]:
    """One optimiser step on a minibatch; returns its metrics, `loss` and `grad_norm` (of the first optimiser) among them.

    at:    the position in the learning-rate schedule.
    clock: is told how long forward passes (with the loss), backward passes and the optimiser take.

    The result does not depend on how the minibatch is cut into micro-batches of at most `token_budget` packed tokens, so that one which
    does not fit into memory is begun anew with smaller ones; how often is among the metrics then (`out_of_memory`).
    Raises NumericalError with the samples, and with no weight changed, when a column of the batch, a loss or a gradient is not finite.
    """
    clock = clock or Clock()
    finite.check(batch, token_budget)
    try:
        (means, maxima), times = fitted(
            lambda budget: _gather(batch, forward, loss, budget, clock), token_budget, batch.smaller, lambda: _clear(optimisers)
        )
        with clock("optimiser"):
            norms = [optimiser.grad_norm() for optimiser in optimisers]
        if not all(map(math.isfinite, norms)):
            raise finite.refusal(f"the gradient's norm is {norms}", _culprits(batch, forward, loss, optimisers, token_budget))
        interrupt.pause()
    except BaseException:
        _clear(optimisers)
        raise
    interrupt.commit()
    with clock("optimiser"):
        for optimiser, norm in zip(optimisers, norms, strict=True):
            optimiser.step(at, norm)
    shortage = {"out_of_memory": float(times)} if times else {}
    return {name: float(value) for name, value in {**means, **maxima}.items()} | {"grad_norm": norms[0]} | shortage


class Ahead:
    """The forward pass of an update, of which a look just before may have made the first part.

    `look` runs a minibatch's first micro-batch with gradient, and the update that comes next begins with its outputs: one forward pass
    less, with the same numbers bit for bit, for the memory of one micro-batch. No weight may change in between.
    """

    def __init__(self, forward: Callable[[Batch], Outputs]) -> None:
        self.forward = forward
        self.kept: tuple[Batch, Outputs] | None = None

    def look(self, batch: Batch, *, token_budget: int, forward: Callable[[Batch], Outputs] | None = None) -> Outputs:
        """What `observe` says of a minibatch that is learnt from next. forward: a pass that says more."""
        said, _ = fitted(lambda budget: self._look(batch, budget, forward or self.forward), token_budget, batch.smaller, self.forget)
        return said

    def _look(self, batch: Batch, token_budget: int, forward: Callable[[Batch], Outputs]) -> Outputs:
        first, *rest = batch.micro_batches(token_budget)
        with torch.no_grad():
            others = [passed(micro, forward) for micro in rest]  # before there is something to be kept: they take its memory
        outputs = passed(first, forward)
        self.kept = first, outputs
        return join([outputs, *others])

    def forget(self) -> None:
        """Let go of the first part."""
        self.kept = None

    def __call__(self, batch: Batch) -> Outputs:
        kept, self.kept = self.kept, None  # for the first micro-batch after the look, and for nothing else
        return kept[1] if kept is not None and self.serves(kept[0], batch) else self.forward(batch)

    @staticmethod
    def serves(kept: Batch, batch: Batch) -> bool:
        """Whether two batches hold the very same responses, whatever columns they have by now."""
        ours, theirs = ([(len(group.responses), *map(id, group.responses)) for group in b.groups] for b in (kept, batch))
        return ours == theirs


def _gather(
    batch: Batch, forward: Callable[[Batch], Outputs], loss: LossFunction, token_budget: int, clock: Clock
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Gradients and metrics of a minibatch, micro-batch by micro-batch."""
    counts = Counts.of(batch)
    means: dict[str, Tensor] = {}
    maxima: dict[str, Tensor] = {}
    for number, micro in enumerate(batch.micro_batches(token_budget)):
        interrupt.pause()
        with clock("forward"):
            outputs = forward(micro)
            part = loss(outputs, micro, counts)
            value = part.value.detach()
        if not torch.isfinite(value):
            rows = finite.suspects(micro, finite.said(outputs), number) or finite.all_of(micro, "loss", number)
            raise finite.refusal(f"the loss is {float(value)}", rows)
        del outputs
        with clock("backward"):
            part.value.backward()
        for name, term in {**part.means, "loss": value}.items():
            means[name] = means.get(name, torch.zeros(())) + term.detach()
        for name, term in part.maxima.items():
            maxima[name] = torch.maximum(maxima[name], term.detach()) if name in maxima else term.detach()
    return means, maxima


def _culprits(
    batch: Batch, forward: Callable[[Batch], Outputs], loss: LossFunction, optimisers: Sequence[Optimiser], token_budget: int
) -> list[finite.Row]:
    """The groups whose own gradient is not finite, found one by one; all, where only their sum is not."""
    counts, rows, every = Counts.of(batch), list[finite.Row](), list[finite.Row]()
    for number, micro in enumerate(batch.micro_batches(token_budget)):
        every += finite.all_of(micro, "gradient", number)
        for group in range(len(micro.groups)):
            _clear(optimisers)
            alone = micro.select([group])
            loss(forward(alone), alone, counts).value.backward()
            if not all(bool(torch.isfinite(gradient).all()) for optimiser in optimisers for gradient in optimiser.gradients()):
                rows += finite.all_of(alone, "gradient", number)
    return rows or every


def _clear(optimisers: Sequence[Optimiser]) -> None:
    for optimiser in optimisers:
        optimiser.zero_grad()
