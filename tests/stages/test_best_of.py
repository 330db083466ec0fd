"""Best-of-n of a real model against the exact distribution, where one token makes all responses listable."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from trimtab.batch import Batch, observe
from trimtab.config import load_recipe
from trimtab.engines.sampling import SamplingConfig
from trimtab.errors import ConfigError
from trimtab.maths.best_of_n import best_of_n_logprobs, kl_bound, kl_divergence
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.rewards.function import FunctionReward
from trimtab.stages.evaluate import EvaluateConfig, measure
from trimtab.types import Group, Response


def level(prompt: str, response: str, row: object) -> float:
    """Many ties: letters by their code, in steps of eight."""
    return float(ord(response) // 8) if response else 0.0


def models(folder: Path) -> tuple[LanguageModel, LanguageModel]:
    paths = [tiny.folder(folder / name, seed=seed) for seed, name in enumerate(("model", "start"))]
    ours, start = (LanguageModel.load(ModelConfig(path=str(path), dtype="float32"), trainable=False) for path in paths)
    return ours, start


@pytest.mark.parametrize("same", [True, False])
def test_measured_kl_of_best_of_n_is_at_least_the_exact_kl_and_close_to_it(tmp_path: Path, same: bool) -> None:
    (model, other), n, draws = models(tmp_path), 4, 800
    reference = model if same else other
    prompt = model.template.prompt("say one")
    measured = measure(
        model, reference.forward, [prompt] * draws, [FunctionReward(level)], SamplingConfig(max_tokens=1), seed=0, n=n,
        selector=FunctionReward(level), rows=4096,
    )  # fmt: skip
    everything = Group(prompt, tuple(Response((t,), model.template.decode([t])) for t in range(tiny.VOCABULARY)))
    own, ref = (observe(Batch((everything,)), m.forward, token_budget=1000).logprobs.double() for m in (model, reference))
    rewards = torch.tensor([level("", r.text, None) for r in everything.responses], dtype=torch.float64)
    best = best_of_n_logprobs(own, rewards, n)
    drift = float((best.exp() * (own - ref)).sum())
    exact, found = float(kl_divergence(own, rewards, n)) + drift, torch.tensor(measured.kl, dtype=torch.float64)
    noise = 4 * float(found.std()) / draws**0.5
    assert exact - noise <= float(found.mean()) <= kl_bound(n) + drift + noise
    gold = torch.tensor(measured.scores["level"], dtype=torch.float64)
    assert float(gold.mean()) == pytest.approx(float((best.exp() * rewards).sum()), abs=4 * float(gold.std()) / draws**0.5)


def test_greedy_best_of_n_is_refused() -> None:
    with pytest.raises(ConfigError, match="greedy responses are all the same"):
        load_recipe(EvaluateConfig, None, ["data.path=x.jsonl", "reward.function=a:b", "best_of=4", "sampling.temperature=0"])
