"""The models of the benchmark, made once in build/bench/models: `python -m bench.models NAME` (smollm2, smollm2-reward, 17m, ...).

Each is a folder in Hugging Face layout that all sides load, with a tokenizer of one word per id, so that texts given to a peer
become exactly the ids they were made of.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from bench.data import EOS, PAD, UNKNOWN
from bench.link import ROOT

FOLDER = ROOT / "build" / "bench" / "models"

FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
SHAPES = {
    "tiny": (64, 128, 2, 4, 2, 8192),
    "10m": (256, 688, 8, 4, 2, 16384),
    "17m": (256, 688, 6, 4, 2, 49152),
    "135m": (576, 1536, 30, 9, 3, 49152),
    "360m": (960, 2560, 32, 15, 5, 49152),
    "1b": (2048, 8192, 16, 32, 8, 128256),
    "3b": (3072, 8192, 28, 24, 8, 128256),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}
"""Llama shapes with random weights, named after their sizes. `NAME:vocab_size=4096,...` changes a shape."""


def folder_of(name: str) -> Path:
    return FOLDER / name.replace(":", "_").replace("=", "-").replace(",", "_")


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a model that has been made."""
    config: dict[str, Any] = json.loads((folder_of(name) / "config.json").read_text())
    return config


def make(name: str) -> Path:
    """The folder of a model; made if it is not there."""
    target = folder_of(name)
    if not (target / "config.json").exists():
        staging = target.with_name(f".{target.name}")
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        if name.endswith("-reward"):
            _reward(make(name.removesuffix("-reward")), staging)
        elif name == "smollm2":
            _default(staging)
        else:
            _random(name, staging)
        staging.rename(target)
    return target


def _default(folder: Path) -> None:
    from trimtab.models.default import default_model

    for file in default_model().iterdir():
        if not file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
            shutil.copy(file, folder)
    _ends_in_eos(folder)
    _tokenizer(folder)


def _random(name: str, folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    base, _, changes = name.partition(":")
    shape = dict(zip(FIELDS, SHAPES[base], strict=True))
    shape |= {key: int(value) for key, _, value in (change.partition("=") for change in changes.split(",") if change)}
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, max_position_embeddings=8192, tie_word_embeddings=True, bos_token_id=UNKNOWN, eos_token_id=EOS, pad_token_id=PAD
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    _ends_in_eos(folder)
    _tokenizer(folder)


def _reward(source: Path, folder: Path) -> None:
    """The same trunk with a score head w ~ N(0, 1 / (d + 1))."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=torch.bfloat16)
    width = model.score.in_features
    model.score.weight.data = (torch.randn(1, width, generator=torch.Generator().manual_seed(0)) / (width + 1) ** 0.5).to(torch.bfloat16)
    model.save_pretrained(folder)
    _ends_in_eos(folder)
    _tokenizer(folder)


def _ends_in_eos(folder: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        file = folder / name
        if file.exists():
            settings = json.loads(file.read_text())
            file.write_text(json.dumps(settings | {"eos_token_id": EOS, "pad_token_id": PAD, "bos_token_id": UNKNOWN}, indent=2))


def _tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    names = {EOS: "<eos>", PAD: "<pad>", UNKNOWN: "<unk>"}
    core = Tokenizer(models.WordLevel({names.get(i, f"t{i}"): i for i in range(size)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(make(wanted))
