"""Log-probabilities of a frozen reference, computed once and kept on disk: another seed, loss or run then reads them.

An entry is a folder named by a hash of all that decides its numbers: the reference's weights and architecture, the token ids of every
group in their order, the packed tokens per forward pass (rounding depends on the company a group is computed in), the kind of device,
the version of torch and whether kernels are compiled. So a run gives the same result, bit for bit, whether its reference was read or
computed.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from trimtab import kernels
from trimtab.batch import Batch
from trimtab.errors import RunError
from trimtab.models.base import PackedModel
from trimtab.places import cache_folder
from trimtab.snapshot import save_atomically
from trimtab.types import Group

FORMAT = 3
"""Raised when the forward pass changes what it computes, so that older entries are not read."""

COLUMN, MANIFEST = "logprobs.safetensors", "manifest.json"

Found = Literal["read", "computed", "damaged", "not kept"]
"""What became of a column: read; computed and kept; computed because the entry was damaged; computed, but the folder cannot be written."""


def folder(setting: str | None) -> Path | None:
    """The folder a recipe names: "default" is reference/ in trimtab's cache folder."""
    return cache_folder() / "reference" if setting == "default" else None if setting is None else Path(setting)


class ReferenceCache:
    """The columns of one reference. `model` must be the reference when the cache is made: the policy before its first step."""

    def __init__(self, folder: Path, model: PackedModel) -> None:
        self.folder, self.model = folder, model_hash(model)
        self.device = model.device.type

    def column(self, batch: Batch, token_budget: int, compute: Callable[[], Tensor]) -> tuple[Tensor, Found]:
        """The reference's log-probability of every response token of a batch, read if it is there, else computed and kept."""
        entry = self.folder / self._key(batch.groups, token_budget)
        kept = _read(entry, sum(batch.lengths))
        if kept is not None:
            return kept, "read"
        damaged, column = entry.exists(), compute()
        try:
            _write(entry, column)
        except RunError:
            return column, "not kept"
        return column, "damaged" if damaged else "computed"

    def _key(self, groups: Sequence[Group], token_budget: int) -> str:
        settings = [FORMAT, self.model, data_hash(groups), token_budget, self.device, torch.__version__, kernels.library() is not None]
        return hashlib.blake2b(json.dumps(settings).encode(), digest_size=16).hexdigest()


def model_hash(model: PackedModel) -> str:
    """A hash of what a model computes: its configuration, and every weight with its name, precision and shape.

    An adapter as it starts changes nothing (B = 0), so it is left out: with and without LoRA the reference is the same.
    """
    weights = list(model.plain.named_parameters())
    if not any(bool(p.any()) for name, p in weights if "lora_B" in name):
        weights = [(name.replace(".base_layer", ""), p) for name, p in weights if "lora_" not in name]
    with ThreadPoolExecutor() as pool:  # hashlib lets other threads run
        digests = list(pool.map(_weight_hash, weights))
    unsaid = ("_name_or_path", "transformers_version", "architectures", "torch_dtype", "dtype")
    config = {name: value for name, value in model.plain.config.to_dict().items() if name not in unsaid}
    text = json.dumps([config, sorted(digests)], sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _weight_hash(named: tuple[str, Tensor]) -> str:
    name, weight = named
    raw = weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{name} {weight.dtype} {tuple(weight.shape)} {hashlib.blake2b(raw, digest_size=16).hexdigest()}"


def data_hash(groups: Sequence[Group]) -> str:
    """A hash of the token ids of every prompt and response, in their order."""
    digest = hashlib.blake2b(digest_size=16)

    def rows(group: Group) -> Iterator[tuple[int, ...]]:
        yield (len(group.responses),)
        for tokens in (group.prompt.tokens, *(r.tokens for r in group.responses)):
            yield (len(tokens),)
            yield tokens

    for group in groups:
        digest.update(array("q", [i for row in rows(group) for i in row]).tobytes())
    return digest.hexdigest()


def _read(entry: Path, tokens: int) -> Tensor | None:
    """The column of an entry; None where there is none, or where it is not as it was written."""
    try:
        raw = (entry / COLUMN).read_bytes()
        manifest = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        if manifest != {"tokens": tokens, "blake2b": _sum(raw)}:
            return None
        return load(raw)["logprobs"]
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def _write(entry: Path, column: Tensor) -> None:
    raw = save({"logprobs": column.contiguous()})

    def fill(staging: Path) -> None:
        (staging / COLUMN).write_bytes(raw)
        (staging / MANIFEST).write_text(json.dumps({"tokens": len(column), "blake2b": _sum(raw)}) + "\n", encoding="utf-8")

    try:
        save_atomically(entry, fill)
    except OSError as error:  # the folder itself cannot be made
        raise RunError(f"cannot keep the reference's log-probabilities: {error}", where=str(entry)) from error


def _sum(raw: bytes) -> str:
    return hashlib.blake2b(raw, digest_size=16).hexdigest()
