"""Runs the loss functions of one TRL version on given tensors: `worker.py FOLDER MODULE`, one request per line of standard input.

Started by peer.py with a folder that holds one TRL version first on the path. MODULE names the file beside this one that knows
where that version keeps its losses. A request names a function, its settings, a safetensors file of inputs, the inputs to take
gradients of, and where the answer goes. Nothing of trimtab is imported here.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
import warnings
from typing import Any

from safetensors.torch import load_file, save_file


def answer(peer: Any, request: dict[str, Any]) -> None:
    """Call `peer.FUNCTION(tensors, **settings) -> {name: tensor}`; "loss" among them is differentiated."""
    tensors = load_file(request["inputs"])
    for name in request["wrt"]:
        tensors[name].requires_grad_()
    results = getattr(peer, request["function"])(tensors, **request["settings"])
    if request["wrt"]:
        results["loss"].backward()
        results |= {f"grad.{name}": tensors[name].grad for name in request["wrt"]}
    save_file({name: value.detach().contiguous() for name, value in results.items()}, request["outputs"])


def main(folder: str, module: str) -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever TRL prints must not mix with the replies
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    peer = importlib.import_module(module)
    for line in sys.stdin:
        try:
            answer(peer, json.loads(line))
            replies.write("{}\n")
        except Exception:
            replies.write(json.dumps({"error": traceback.format_exc()}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
