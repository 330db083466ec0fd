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
    *,
    keep: bool,
) -> None:
    """Fill logprobs, norms = log sum_v exp(scale z_v) and entropies; with `keep`, write the probabilities over the logits."""
    targets = targets.contiguous()
    read = (kernels.address(logits), kernels.address(targets), ctypes.c_float(scale), *logits.shape, int(keep))
    kernels.loaded().head_forward(*read, kernels.address(logprobs), kernels.address(norms), kernels.address(entropies))


def backward(
    kept: Float[Tensor, "rows vocabulary"],
    targets: Int[Tensor, " rows"],
    logprobs: Float[Tensor, " rows"],
    pull: Float[Tensor, " rows"],
    slope: float,
) -> None:
    """Write slope pull (1[v = target] - p_v) over the probabilities."""
    columns = [x.contiguous() for x in (targets, logprobs, pull)]  # held until the call is over
    kernels.loaded().head_backward(kernels.address(kept), *map(kernels.address, columns), ctypes.c_float(slope), *kept.shape)
