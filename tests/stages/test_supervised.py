"""SFT and reward modelling on tiny real models: they learn what is planted, and what they save loads anywhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab.config import load_recipe
from trimtab.data.records import load_comparisons
from trimtab.errors import DataError
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.stages.common import comparison_batch
from trimtab.stages.reward import RewardModelConfig, accuracy, reward
from trimtab.stages.sample import SampleConfig, sample
from trimtab.stages.sft import SFTConfig, sft

WORDS = ["apple", "river", "stone", "cloud", "table", "horse", "paper", "light", "green", "seven"]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model", scale=1.0)
    with (tmp_path / "sft.jsonl").open("w") as file:
        file.writelines(json.dumps({"prompt": f"{w}:", "completion": "yes yes"}) + "\n" for w in WORDS)
    with (tmp_path / "pairs.jsonl").open("w") as file:
        file.writelines(
            json.dumps({"prompt": f"{w}?", "chosen": f"good {w}", "rejected": f"bad {v}"}) + "\n" for w in WORDS for v in WORDS[:4]
        )
    return tmp_path


def recipe(kind: Any, place: Path, data: str, *overrides: str) -> Any:
    settings = [f"model.path={place / 'model'}", "model.dtype=float32", f"data.path={place / data}", "fit.batch_size=8", "optim.lr=3e-3"]
    return load_recipe(kind, None, [*settings, f"output={place / 'run'}", *overrides])


def test_sft_learns_the_answer_and_saves_a_plain_model(place: Path) -> None:
    tracker = tiny.Recorder()
    metrics = sft(
        recipe(SFTConfig, place, "sft.jsonl", "fit.steps=120", "optim.lr=1e-2", "data.holdout=0.3", "fit.eval_every=40"),
        place / "run",
        tracker,
    )
    assert metrics["loss/nll"] < 0.2
    assert metrics["eval/nll"] < 0.5
    model = AutoModelForCausalLM.from_pretrained(place / "run/checkpoints/last/model")
    assert torch.isfinite(model(torch.tensor([[5, 6]])).logits).all()
    (group,) = sample(
        SampleConfig(model=ModelConfig(path=str(place / "run")), prompt="house:", sampling={"temperature": 0, "max_tokens": 12})
    )
    assert group.responses[0].text == "yes yes"
    assert not group.responses[0].truncated


def test_sft_loss_is_the_plain_models_loss(place: Path) -> None:
    tracker = tiny.Recorder()
    sft(recipe(SFTConfig, place, "sft.jsonl", "fit.steps=1", "fit.batch_size=10"), place / "run", tracker)
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    tokenizer, total, count = tiny.tokenizer(), 0.0, 0
    for word in WORDS:
        prompt, answer = tokenizer.encode(f"{word}:"), [*tokenizer.encode("yes yes"), 0]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        total += float(model(torch.tensor([[*prompt, *answer]]), labels=labels).loss.detach()) * len(answer)
        count += len(answer)
    assert tracker.metrics[0]["loss/nll"] == pytest.approx(total / count, abs=1e-5)


@pytest.mark.parametrize("lora", ["null", "{rank: 8}"])
def test_reward_model_learns_a_planted_preference(place: Path, lora: str) -> None:
    config = recipe(RewardModelConfig, place, "pairs.jsonl", "fit.steps=40", "data.holdout=0.2", f"model.lora={lora}")
    tracker = tiny.Recorder()
    metrics = reward(config, place / "run", tracker)
    assert metrics["eval/accuracy"] == 1.0
    assert metrics["eval/accuracy_low"] < 1.0 == metrics["eval/accuracy_high"]
    assert metrics["eval/longer_wins"] > metrics["eval/shorter_wins"]  # "good" is longer than "bad"
    again = Scorer.load(ModelConfig(path=str(place / "run"), dtype="float32"), head="saved", trainable=False)
    held = comparison_batch(load_comparisons(config.data, again.template).holdout)
    assert accuracy(again, held, 10_000)["eval/accuracy"] == 1.0


def test_a_ranking_of_k_is_all_its_pairs(place: Path) -> None:
    rows = [{"prompt": f"{w}?", "responses": [f"good {w}", f"fair {w}", f"bad {w}"]} for w in WORDS]
    (place / "ranked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = reward(recipe(RewardModelConfig, place, "ranked.jsonl", "fit.steps=40"), place / "run", tiny.Recorder())
    assert metrics["train/accuracy"] == pytest.approx(1.0)
    config = recipe(RewardModelConfig, place, "ranked.jsonl")
    batch = comparison_batch(load_comparisons(config.data, LanguageModel.load(config.model).template).records)
    assert len(batch.pairs()[0]) == 3 * len(WORDS)


def test_best_of_n_keeps_the_highest_score(place: Path) -> None:
    (place / "reward.py").write_text("def length(prompt, response, row):\n    return len(response)\n")
    common: dict[str, Any] = {"model": ModelConfig(path=str(place / "model")), "prompt": "apple", "n": 6}
    (group,) = sample(SampleConfig(**common))
    (best,) = sample(SampleConfig(**common, reward={"function": f"{place / 'reward.py'}:length"}))
    assert len(best.responses) == 1
    assert len(best.responses[0].text) == max(len(r.text) for r in group.responses)


def test_data_longer_than_the_context_is_refused_before_training(place: Path) -> None:
    (place / "long.jsonl").write_text(json.dumps({"prompt": "a" * 300, "completion": "b"}) + "\n")
    with pytest.raises(DataError, match="reads at most 256"):
        sft(recipe(SFTConfig, place, "long.jsonl"), place / "run", tiny.Recorder())
    assert not (place / "run").exists()


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_time_of_a_step_is_split(place: Path, kind: str) -> None:
    tracker = tiny.Recorder()
    if kind == "sft":
        sft(recipe(SFTConfig, place, "sft.jsonl", "fit.steps=3"), place / "run", tracker)
    else:
        reward(recipe(RewardModelConfig, place, "pairs.jsonl", "fit.steps=3"), place / "run", tracker)
    for row in tracker.metrics:
        parts = [row[f"time/{part}"] for part in ("forward", "backward", "optimiser")]
        assert min(parts) > 0
        assert sum(parts) <= row["time/step"]
