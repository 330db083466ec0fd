"""Which records come at which step. There is no state to save: the answer follows from the seed and the step alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trimtab.seeds import derive


@dataclass(frozen=True)
class Cursor:
    """Walks through `count` records, `batch_size` at a step, in a new order every epoch, without replacement.

    Batches run on across the end of an epoch, so every batch is full.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1:
            raise ValueError(f"a cursor needs records and a batch size, got {self.count} and {self.batch_size}")

    def at(self, step: int) -> list[int]:
        """The indices of the records of a step (0 is the first)."""
        if step < 0:
            raise ValueError(f"there is no step {step}")
        first = step * self.batch_size
        return [
            int(_order(self.count, self.seed, position // self.count)[position % self.count])
            for position in range(first, first + self.batch_size)
        ]

    def epoch(self, step: int) -> float:
        """How many times the data has been passed through before a step."""
        return step * self.batch_size / self.count


@lru_cache(maxsize=8)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.intp]:
    """The order of one epoch: records sorted by 64 random bits each.

    numpy promises the raw bits of PCG64 for all versions and platforms, but not its shuffles.
    """
    keys = np.random.PCG64(derive(seed, "order of the data", epoch)).random_raw(count)
    return np.argsort(keys, kind="stable")
