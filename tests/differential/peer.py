"""TRL in a process of its own, so that three versions of it can be asked from one test run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

HERE = Path(__file__).resolve().parent
TRL = HERE.parents[1] / ".trl"
"""Where `make test-differential` puts each version."""


class Peer:
    """One TRL version. Calling it runs one of the functions of its module in a worker process."""

    def __init__(self, version: str, scratch: Path) -> None:
        folder = TRL / version
        if not (folder / "trl").is_dir():
            raise FileNotFoundError(f"TRL {version} is not in {folder.parent.name}/: run `make test-differential`, which fetches it")
        module = f"trl_{version.replace('.', '_')}"
        environment = os.environ | {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
        self.version, self.scratch = version, scratch
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), str(folder), module],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip

    def __call__(self, function: str, tensors: dict[str, Tensor], wrt: Sequence[str] = (), **settings: Any) -> dict[str, Tensor]:
        """What FUNCTION gives for these tensors; with `wrt`, also "grad.NAME" of its "loss" for each name."""
        inputs, outputs = self.scratch / "inputs.safetensors", self.scratch / "outputs.safetensors"
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, inputs)
        request = {"function": function, "settings": settings, "wrt": list(wrt), "inputs": str(inputs), "outputs": str(outputs)}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            raise RuntimeError(f"the worker of TRL {self.version} ended with status {self.process.wait()}; its words are above")
        if error := json.loads(reply).get("error"):
            raise RuntimeError(f"TRL {self.version}, {function}:\n{error}")
        return load_file(outputs)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)
