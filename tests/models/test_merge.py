"""A LoRA adapter merged into its base is the same policy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny
from trimtab.batch import Batch
from trimtab.models.language import LanguageModel
from trimtab.models.loading import LoraConfig, ModelConfig
from trimtab.models.merge import MergeConfig, merge
from trimtab.types import Group, Prompt, Response

BATCH = Batch((Group(Prompt((5, 6), ""), (Response((7, 8, 0), ""), Response((9, 0), ""))),))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_adapter_saves_loads_and_merges_to_the_same_policy(architecture: str, tmp_path: Path) -> None:
    base = tiny.folder(tmp_path / "base", architecture)
    model = LanguageModel.load(ModelConfig(path=str(base), dtype="float32", lora=LoraConfig(rank=4)))
    start = model.forward(BATCH).logprobs
    with torch.no_grad():
        for parameter in model.trainable().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    tuned = model.forward(BATCH).logprobs
    assert (tuned - start).abs().max() > 1e-3
    with model.without_adapter():
        assert torch.equal(model.forward(BATCH).logprobs, start)
    model.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    again = LanguageModel.load(ModelConfig(path=str(tmp_path / "adapter"), dtype="float32"))
    assert torch.allclose(again.forward(BATCH).logprobs, tuned, atol=1e-5)
    merge(MergeConfig(adapter=str(tmp_path / "adapter"), output=str(tmp_path / "merged"), dtype="float32"))
    merged = LanguageModel.load(ModelConfig(path=str(tmp_path / "merged"), dtype="float32"))
    assert torch.allclose(merged.forward(BATCH).logprobs, tuned, atol=1e-5)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_an_adapters_folder_is_the_same_from_every_process(tmp_path: Path) -> None:
    """Its modules are named in order: a set's order is another one in every process."""
    base = tiny.folder(tmp_path / "base")
    for name, targets in (("all", "all-linear"), ("some", ["v_proj", "q_proj", "up_proj", "o_proj", "down_proj", "k_proj"])):
        LanguageModel.load(ModelConfig(path=str(base), lora=LoraConfig(rank=2, target_modules=targets))).save(tmp_path / name)
        said = json.loads((tmp_path / name / "adapter_config.json").read_text())["target_modules"]
        assert len(said) >= 6
        assert said == sorted(said)
