"""Merging a trained LoRA adapter into its base model: one folder that loads anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from trimtab.config import Config
from trimtab.models import loading
from trimtab.models.loading import ModelConfig
from trimtab.snapshot import save_atomically


class MergeConfig(Config):
    """A recipe of `trimtab merge`."""

    adapter: str = Field(description="the adapter's folder, or the run directory that trained it")
    output: str = Field(description="the folder to write")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field("auto", description="precision of the merged weights")


def merge(config: MergeConfig) -> Path:
    """W + (alpha / rank) B A as ordinary weights, in Hugging Face layout."""
    from transformers import AutoModelForCausalLM

    path = loading.resolve_path(config.adapter)
    model = loading.load_model(AutoModelForCausalLM, ModelConfig(path=path, dtype=config.dtype))
    template = loading.load_template(path, "auto")

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        loading.save_template(template, folder)

    written = save_atomically(Path(config.output), write)
    print(written)
    return written
