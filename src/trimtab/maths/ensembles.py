"""Several opinions as one score."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

Reading = Literal["mean", "weighted", "min", "uncertainty"]


def combine(
    members: Float[Tensor, "responses members"], how: Reading, weights: Float[Tensor, " members"] | None = None, penalty: float = 0.0
) -> Float[Tensor, " responses"]:
    """Scores r_1 .. r_K of each response as one:

        mean         (1/K) sum_k r_k
        weighted     (1/K) sum_k w_k r_k
        min          min_k r_k                               the most pessimistic member
        uncertainty  mean - penalty (1/K) sum_k (r_k - mean)^2   what members disagree on is worth less

    A policy that is trained against min or uncertainty finds it harder to please one member's mistakes. Source: Coste et al. 2023.
    """
    if how == "min":
        return members.min(dim=1).values
    if how == "weighted":
        return (members * (torch.ones_like(members[0]) if weights is None else weights)).mean(dim=1)
    mean = members.mean(dim=1)
    return mean - penalty * members.var(dim=1, correction=0) if how == "uncertainty" else mean
