"""Kernels in C++ for what a CPU does badly in many small operations; compiled on the user's machine, once.

Everything here has a counterpart in plain torch, which is used where there is no kernel: another processor or precision, no compiler,
or TRIMTAB_KERNELS=off. Where the processor has a tile unit (AMX) products take it, unless TRIMTAB_KERNELS=avx512. Results differ in
rounding only. Arrays are passed by address (ctypes), so the library needs nothing of torch but its OpenMP threads, and compiles in
seconds.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from trimtab.places import cache_folder

log = logging.getLogger(__name__)

NEEDS = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
TILES = {"amx_tile", "amx_bf16"}
"""What makes products several times faster where a processor has it (AMX)."""

FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-fPIC")


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    if os.environ.get("TRIMTAB_KERNELS") == "off":
        return None
    processor, compiler = _processor(), _compiler()
    if compiler is None or not set(processor.split()) >= NEEDS:
        return None
    try:
        torch.get_num_threads()  # torch's OpenMP is loaded before the library asks for one: both then share its threads
        tiles = has_tiles() and os.environ.get("TRIMTAB_KERNELS") != "avx512"
        flags = FLAGS if tiles else (*FLAGS, "-DWITHOUT_TILES")
        return ctypes.CDLL(str(_compiled(compiler, processor, flags)))
    except (OSError, subprocess.CalledProcessError) as error:
        said = str(getattr(error, "stderr", "") or error).strip()
        log.warning("the CPU kernels could not be compiled, so the slower way is taken (TRIMTAB_KERNELS=off is silent): %s", said[-300:])
        return None


def loaded() -> ctypes.CDLL:
    """The compiled kernels, where `serves` has said that there are some."""
    found = library()
    assert found is not None
    return found


def serves(x: Tensor) -> bool:
    """Whether there are kernels for tensors like this one."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and library() is not None


@cache
def has_tiles() -> bool:
    """Whether there is a tile unit that this process may use: Linux gives its registers to a process that asks."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return set(_processor().split()) >= TILES and bool(ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0)


def address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def by_token(x: Tensor) -> Tensor:
    """[n, heads, dim] with the heads of a token side by side."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def checked(failed: int) -> None:
    """Raises MemoryError where a kernel says that memory ran out."""
    if failed:
        raise MemoryError("no memory for a kernel's scratch")


def _processor() -> str:
    """What the processor can do, as Linux tells it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")


def _compiler() -> str | None:
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _compiled(compiler: str, processor: str, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library's file: compiled if this source, compiler and processor have not met before."""
    folder = Path(__file__).parent
    sources = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")])
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [*(file.read_bytes() for file in sources), *(text.encode() for text in (version, processor, *flags))]
    target = cache_folder() / "kernels" / f"{hashlib.sha256(b'|'.join(parts)).hexdigest()[:20]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as staging:

            def make(output: str, *arguments: str) -> str:
                made = str(Path(staging) / output)
                subprocess.run([compiler, *flags, *arguments, "-o", made], capture_output=True, text=True, check=True)
                return made

            units = [file for file in sources if file.suffix == ".cpp"]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(lambda file: make(f"{file.stem}.o", "-c", str(file)), units))
            os.replace(make(target.name, "-shared", *objects), target)
    return target
