"""What the machine can do at this moment: matrix products in bf16 and fp32, and reading memory. A worker, asked between steps."""

from __future__ import annotations

import time
from typing import Any

from bench.link import Reply, serve

SHAPES = ((1024, 576, 1536), (1024, 1536, 576), (2048, 576, 576), (512, 576, 49152), (1024, 1024, 1024), (2048, 2048, 2048))
"""Rows, inner and outer size: those of the default model's layers and head, and large squares."""

READ_BYTES = 2**28


def measure(
    seconds: float = 0.12, device: str = "cpu", precisions: tuple[str, ...] = ("bfloat16", "float32"), sustained: float = 0.0
) -> Reply:
    """Operations per second (the best call of the best of the shapes, each tried for `seconds`) and bytes read per second.

    sustained: for so many seconds the best shape's product in bfloat16 is then made again and again. That is all that matrix products alone
    keep up for as long as a step, on a machine that is shared: the best call falls into its best hundredth of a second.
    """
    import torch

    ceilings: dict[str, Any] = {}
    with torch.no_grad():
        for name in precisions:
            dtype = getattr(torch, name)
            found = {shape: _gemm(torch, shape, dtype, device, seconds)[0] for shape in SHAPES}
            ceilings[f"gemm_{name}"] = max(found.values())
            if sustained and name == "bfloat16":
                ceilings["gemm_bfloat16_sustained"] = _gemm(torch, max(found, key=lambda shape: found[shape]), dtype, device, sustained)[1]
        ceilings["read_bytes"] = _read(torch, device, seconds)
    return ceilings


def _gemm(torch: Any, shape: tuple[int, int, int], dtype: Any, device: str, seconds: float) -> tuple[float, float]:
    """Operations per second of the best call, and of all calls together."""
    rows, inner, outer = shape
    x, w = torch.randn(rows, inner, device=device).to(dtype), torch.randn(outer, inner, device=device).to(dtype)
    torch.nn.functional.linear(x, w)
    took, end = [], time.perf_counter() + seconds
    while not took or time.perf_counter() < end:
        took.append(_timed(torch, device, lambda: torch.nn.functional.linear(x, w)))
    operations = 2.0 * rows * inner * outer
    return operations / min(took), operations * len(took) / sum(took)


def _read(torch: Any, device: str, seconds: float) -> float:
    x = torch.ones(READ_BYTES // 4, device=device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _timed(torch, device, x.sum))
    return READ_BYTES / best


def _timed(torch: Any, device: str, do: Any) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    do()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    serve({"measure": measure})
