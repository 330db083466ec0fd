"""Activation checkpointing changes memory and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

import tiny
from trimtab.batch import Batch
from trimtab.engines.local import LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.errors import ConfigError
from trimtab.models import loading
from trimtab.models.language import LanguageModel
from trimtab.models.loading import LoraConfig, ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.types import Group, Prompt, Response

GROUPS = tuple(Group(Prompt((5 + i, 9) * 4, ""), (Response((3, 7 + i, 0), ""), Response((8,) * (i + 5) + (0,), ""))) for i in range(3))


def policy(config: ModelConfig) -> tuple[Any, Callable[[], torch.Tensor]]:
    model = LanguageModel.load(config, template="plain")

    def loss() -> torch.Tensor:
        out = model.forward(Batch(GROUPS), entropy=True)
        return out.logprobs.sum() + out.entropy.square().sum()

    return model, loss


def scorer(config: ModelConfig) -> tuple[Any, Callable[[], torch.Tensor]]:
    model = Scorer.load(config, head="normal", template="plain")
    return model, lambda: model.scores(Batch(GROUPS)).scores.square().sum()


def config(folder: Path, checkpointing: bool, dtype: str = "float64", lora: bool = False) -> ModelConfig:
    adapter = LoraConfig(rank=2) if lora else None
    return ModelConfig(path=str(folder), dtype=dtype, device="cpu", lora=adapter, checkpointing=checkpointing)


def gradients(make: Callable[[ModelConfig], Any], how: ModelConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # peft draws the adapter's start
    model, loss = make(how)
    loss().backward()
    return {name: p.grad for name, p in model.trainable().items() if p.grad is not None}


@pytest.mark.parametrize("make", [policy, scorer])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", "float64"), ("llama", "bfloat16"), ("gpt2", "float32"), ("gemma3", "float32")]
)
def test_gradients_are_the_same_bit_for_bit(tmp_path: Path, make: Any, lora: bool, architecture: str, dtype: str) -> None:
    if architecture == "gpt2" and make is scorer and lora:
        pytest.skip("peft does not find GPT-2's score head")
    folder = tiny.folder(tmp_path / "model", architecture)
    without, checked = (gradients(make, config(folder, on, dtype, lora)) for on in (False, True))
    assert without.keys() == checked.keys()
    assert any(grad.any() for grad in without.values())
    for name, grad in without.items():
        assert torch.equal(grad, checked[name]), name


def kept_bytes(loss: Callable[[], torch.Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, every piece of memory counted once; weights count too."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        value = loss()
        assert value.requires_grad  # alive while it is counted, so that no place in memory is used twice
    return sum(kept.values())


@pytest.mark.parametrize("make", [policy, scorer])
@pytest.mark.parametrize("lora", [False, True])
def test_a_layer_keeps_one_hidden_state_and_no_more(tmp_path: Path, make: Any, lora: bool) -> None:
    tokens = sum(g.token_count - (make is policy) * len(g.responses) for g in GROUPS)
    state = tokens * 32 * 8
    grown = {}
    for on in (False, True):
        sizes = []
        for depth in (2, 6):
            folder = tiny.folder(tmp_path / f"{depth}-{on}", num_hidden_layers=depth)
            sizes.append(kept_bytes(make(config(folder, on, lora=lora))[1]))
        grown[on] = (sizes[1] - sizes[0]) / 4
    assert grown[True] <= 1.01 * state
    assert grown[False] > 10 * state


def test_sampling_and_looking_are_untouched(tmp_path: Path) -> None:
    folder = tiny.folder(tmp_path / "model")
    rollouts = []
    for on in (False, True):
        model = LanguageModel.load(config(folder, on, "float32"), template="plain")
        engine = LocalEngine(model, SamplingConfig(max_tokens=6))
        rollouts.append(engine.generate([g.prompt for g in GROUPS], 2, seed=1))
    assert rollouts[0] == rollouts[1]


def test_a_model_without_layers_says_so() -> None:
    with pytest.raises(ConfigError, match=r"model\.checkpointing"):
        loading.checkpoint_layers(torch.nn.Linear(2, 2))
