"""What is read from logits in bfloat16 and written over them; the mathematics is that of `maths.logprobs`."""

from __future__ import annotations

import ctypes

from jaxtyping import Float, Int
from torch import Tensor

from trimtab import kernels


def forward(
    logits: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
    scale: float,
    logprobs: Float[Tensor, " rows"],
    norms: Float[Tensor, " rows"],
    entropies: Float[Tensor, " rows"] | None,
    keep: Float[Tensor, " rows"] | None,
) -> None:
    """Fill logprobs, norms = log sum_v exp(scale z_v) and entropies.

    With `keep`, weights w are written over the logits, such that the probabilities are p = keep w.
    """
    targets = targets.contiguous()
    read = (kernels.address(logits), kernels.address(targets), ctypes.c_float(scale), *logits.shape)
    kernels.loaded().head_forward(*read, *map(kernels.address, (logprobs, norms, entropies, keep)))


def backward(
    kept: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
    logprobs: Float[Tensor, " rows"],
    keep: Float[Tensor, " rows"],
    pull: Float[Tensor, " rows"],
    slope: float,
) -> None:
    """Write slope pull (1[v = target] - keep w_v) over the weights that `forward` kept."""
    columns = [x.contiguous() for x in (targets, logprobs, keep, pull)]  # held until the call is over
    kernels.loaded().head_backward(kernels.address(kept), *map(kernels.address, columns), ctypes.c_float(slope), *kept.shape)
