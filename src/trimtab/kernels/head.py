"""What is read from the logits l of an output head, and weights w_v = exp(l_v - shift); the mathematics is that of `maths.logprobs`."""

from __future__ import annotations

import ctypes

from jaxtyping import Float, Int
from torch import Tensor

from trimtab import kernels
from trimtab.kernels.products import layers_of


def of_rows(
    x: Float[Tensor, "rows width"],
    weight: Float[Tensor, "vocabulary width"],
    bias: Float[Tensor, " vocabulary"] | None,
    targets: Int[Tensor, " rows"],
    scale: float,
    shift: Float[Tensor, " rows"],
    chosen: Float[Tensor, " rows"],
    total: Float[Tensor, " rows"],
    mean: Float[Tensor, " rows"] | None,
    weights: Float[Tensor, "rows vocabulary"] | None,
) -> None:
    """Of l = scale (x W^T + b), made in float32 and not written down: fill chosen = l_target - shift, total = sum_v w_v,

    mean = sum_v w_v log w_v, and the weights.
    """
    targets, whole = targets.contiguous(), None if bias is None else bias.float()
    head = layers_of([weights], weights=[weight], biases=[whole])
    read = (kernels.address(x), *x.shape, head, kernels.address(targets), ctypes.c_float(scale))
    kernels.checked(kernels.loaded().head_of_rows(*read, *map(kernels.address, (shift, chosen, total, mean))))


def of_logits(
    logits: Float[Tensor, "rows vocabulary"],
    scale: float,
    shift: Float[Tensor, " rows"],
    keep: bool,
    total: Float[Tensor, " rows"],
    mean: Float[Tensor, " rows"] | None,
) -> None:
    """Of l = scale z: fill total and mean, as above; `keep` writes the weights over z."""
    sums = map(kernels.address, (total, mean))
    kernels.loaded().head_of_logits(kernels.address(logits), ctypes.c_float(scale), kernels.address(shift), *logits.shape, int(keep), *sums)
