"""Losses that train a reward model on human judgements."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def bradley_terry(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], margin: Float[Tensor, " pairs"] | float = 0.0
) -> Float[Tensor, " pairs"]:
    """-log sigma(r(x, y_chosen) - r(x, y_rejected) - margin): negative log-likelihood of the choice.

    Unchanged when a function of x alone is added to r. Sources: Bradley and Terry 1952; the margin: Touvron et al. 2023.
    """
    return -torch.nn.functional.logsigmoid(chosen - rejected - margin)


def centring(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """(r_chosen + r_rejected)^2: added with a small weight, it pins the free constant c(x) near 0.

    Source: Eisenstein et al. 2023. It is added to the loss; subtracting it, as printed in some texts, would reward large sums.
    """
    return (chosen + rejected).square()
