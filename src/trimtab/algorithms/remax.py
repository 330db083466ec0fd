"""ReMax (Li et al. 2024): the baseline is what the greedy response to the same prompt scores.

credit     A = sum_t r_t - (the same for the greedy response), the same for every token
policy     -rho A   (at rho = 1 the gradient of -A log pi)
"""

from __future__ import annotations

from torch import Tensor

from trimtab.algorithms.base import PolicyGradient, per_response
from trimtab.batch import Batch


class ReMax(PolicyGradient):
    """See the module's docstring. Reads the response column `baseline`: the return of the prompt's greedy response."""

    greedy_baseline = True

    def assign(self, batch: Batch, rewards: Tensor, values: Tensor | None) -> Tensor:
        return per_response(batch, batch.sum_by_response(rewards))

    def scale(self, batch: Batch, raw: Tensor) -> tuple[Tensor, Tensor]:
        return per_response(batch, batch.responses["baseline"]).to(raw.dtype), raw.new_ones(())
