"""Memory in turns: gradients have places of their own in it, what is lent lies there too, and zeros are left behind."""

from __future__ import annotations

import pytest
import torch

import tiny
from trimtab import kernels
from trimtab.batch import Batch
from trimtab.data.templates import Template
from trimtab.engines.batching import Batcher
from trimtab.engines.local import EngineConfig, LocalEngine
from trimtab.engines.sampling import SamplingConfig
from trimtab.models.language import LanguageModel
from trimtab.models.scratch import Scratch
from trimtab.stages.common import nll_loss
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.training.update import update
from trimtab.types import Group, Prompt, Response

HALF = torch.bfloat16
BATCH = Batch((Group(Prompt((5, 6, 7), ""), (Response((8, 9), ""), Response((10, 11, 12), ""))),))


def test_gradients_of_a_set_lie_apart_and_two_sets_in_the_same_place() -> None:
    small = {"a": torch.ones(3, 5, dtype=HALF), "b": torch.ones(7, dtype=torch.float16), "wide": torch.ones(9)}
    large = {"c": torch.ones(50, dtype=HALF)}
    scratch = Scratch(small, large)
    first, second = scratch.gradients(small), scratch.gradients(large)
    assert {name: x.shape for name, x in first.items()} == {"a": (3, 5), "b": (7,)}  # the wide one has its gradient from autograd
    for value, gradient in enumerate(first.values(), 1):
        gradient.fill_(value)
    assert [float(gradient.sum()) for gradient in first.values()] == [15.0, 14.0]
    assert second["c"].data_ptr() == first["a"].data_ptr()
    assert float(second["c"].sum()) == 29.0


def test_what_is_lent_lies_in_it_while_there_is_room_and_is_zero_afterwards() -> None:
    scratch = Scratch({"a": torch.ones(100, dtype=HALF)})  # 112 numbers of four bytes
    inside = range(scratch.zeros.data_ptr(), scratch.zeros.data_ptr() + 4 * 112)
    empty = scratch.lend()
    arrays = [empty(5, 7), empty(1, 100), empty(10, 10)]
    assert [array.data_ptr() in inside for array in arrays] == [True, True, False]
    for value, array in enumerate(arrays, 1):
        array.fill_(value)
    assert [float(array.float().mean()) for array in arrays] == [1.0, 2.0, 3.0]
    scratch.take_back()
    assert not scratch.zeros.any()
    assert float(arrays[2].float().mean()) == 3.0


@pytest.mark.skipif(kernels.library() is None, reason="no compiler, or a processor without AVX-512 BF16")
def test_a_policy_that_samples_in_its_gradients_memory_learns_and_samples_the_same() -> None:
    def steps(*, lent: bool) -> list[object]:
        model = LanguageModel(tiny.model("llama", HALF, scale=1.0, hidden_size=64, head_dim=32), Template.of(tiny.tokenizer()))
        optimiser = Optimiser(model.trainable(), OptimConfig(lr=1e-2, schedule="constant"), 3)
        scratch = optimiser.scratch if lent else None
        engine = LocalEngine(model, SamplingConfig(max_tokens=6), EngineConfig(rows=4), scratch)
        said: list[object] = []
        for at in range(3):
            said.append([r.tokens for g in engine.generate([BATCH.groups[0].prompt], 4, seed=at) for r in g.responses])
            assert bool(optimiser.scratch.lent) == lent
            engine.sleep()
            assert not optimiser.scratch.zeros.any()
            said.append(update(BATCH, model.forward, nll_loss("token"), [optimiser], at=at, token_budget=64))
        return said

    assert steps(lent=True) == steps(lent=False)


@pytest.mark.skipif(kernels.library() is None, reason="no compiler, or a processor without AVX-512 BF16")
def test_a_sampler_that_fails_gives_back_what_it_was_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        assert scratch.lent
        raise RuntimeError("interrupted")

    model = LanguageModel(tiny.model("llama", HALF, scale=1.0, hidden_size=64, head_dim=32), Template.of(tiny.tokenizer()))
    scratch = Scratch(model.trainable())
    engine = LocalEngine(model, SamplingConfig(max_tokens=6), EngineConfig(rows=4), scratch)
    monkeypatch.setattr(Batcher, "run", fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        engine.generate([BATCH.groups[0].prompt], 4, seed=0)
    assert not scratch.lent
    assert not scratch.zeros.any()


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_optimisers_that_take_turns_step_as_with_memory_of_their_own(dtype: torch.dtype) -> None:
    def weights(*, shared: bool) -> list[torch.Tensor]:
        models = [LanguageModel(tiny.model("llama", dtype, scale=1.0), Template.of(tiny.tokenizer())) for _ in range(2)]
        scratch = Scratch(*(model.trainable() for model in models)) if shared else None
        optimisers = [
            Optimiser(model.trainable(), OptimConfig(lr=10**-i, schedule="constant"), 2, scratch) for i, model in enumerate(models, 2)
        ]
        for at in range(2):
            for model, optimiser in zip(models, optimisers, strict=True):
                update(BATCH, model.forward, nll_loss("token"), [optimiser], at=at, token_budget=64)
        return [weight for optimiser in optimisers for weight in optimiser.weights().values()]

    for ours, other in zip(weights(shared=True), weights(shared=False), strict=True):
        assert torch.equal(ours, other)
