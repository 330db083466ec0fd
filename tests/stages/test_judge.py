"""A language model as the judge: planted preferences and planted position bias, on tiny real models trained to have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab.batch import Batch
from trimtab.cli import main
from trimtab.config import load_recipe
from trimtab.data.records import DataConfig, load_comparisons
from trimtab.data.templates import Template
from trimtab.errors import ConfigError, DataError, ModelError
from trimtab.models.language import LanguageModel
from trimtab.models.loading import ModelConfig
from trimtab.stages.common import nll_loss
from trimtab.stages.judge import JudgeConfig, Pair, ask, compare, comparison_rows, judge, read_pairs
from trimtab.training.fit import FitConfig, Hooks, fit
from trimtab.training.optimiser import OptimConfig, Optimiser

QUESTION = "{prompt}|{a}|{b}|"
WORDS = ["one", "two", "six", "ten", "red", "sea", "sky", "cat"]


def recipe(place: Path, *more: str) -> Any:
    settings = [f"samples={place / 'samples.jsonl'}", f"output={place / 'judged.jsonl'}", f"model.path={place / 'judge'}"]
    return load_recipe(JudgeConfig, None, [*settings, "model.dtype=float32", f"question='{QUESTION}'", *more])


def teach(place: Path, verdict: Callable[[str, str], int]) -> None:
    """Fine-tune a tiny model to answer A or B by the two responses it is shown, and save it as the judge."""
    model = LanguageModel.load(ModelConfig(path=str(tiny.folder(place / "start", scale=1.0)), dtype="float32"))
    pairs = [Pair(w, texts, (False, False)) for w in WORDS for texts in (("good", "poor"), ("poor", "good"))]
    asked = [group for both in ask(pairs, model.template, recipe(place)) for group in both]
    shown = [tuple(str(group.prompt.text).split("|")[1:3]) for group in asked]
    data = Batch(tuple(group.only([verdict(*texts)]) for group, texts in zip(asked, shown, strict=True)))
    optimiser = Optimiser(model.trainable(), OptimConfig(lr=1e-2), 120)
    plan = FitConfig(batch_size=16, steps=120)
    metrics = fit(data, model.forward, nll_loss("token"), [optimiser], plan, tiny.Recorder(), Hooks(dict), seed=0)
    assert metrics["loss/nll"] < 0.05
    model.save(place / "judge")


def samples(place: Path, *rows: dict[str, Any]) -> None:
    (place / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def judged(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "judged.jsonl").read_text().splitlines()]


def test_a_planted_preference_is_found_in_either_order_and_its_rows_train_a_model(tmp_path: Path) -> None:
    teach(tmp_path, lambda a, b: 0 if a == "good" else 1)
    samples(
        tmp_path,
        {"prompt": "dog", "responses": ["poor", "good"], "truncated": [True, False]},
        {"prompt": "sun", "responses": ["good", "poor"], "truncated": [False, False]},
        {"prompt": "sun", "responses": ["good", "good"], "truncated": [False, False]},
    )
    result = judge(recipe(tmp_path))
    assert [(row["chosen"], row["rejected"]) for row in judged(tmp_path)] == [("good", "poor")] * 2
    assert [row.get("rejected_truncated") for row in judged(tmp_path)] == [True, None]
    assert all(0.9 < row["probability"] <= 1 for row in judged(tmp_path))
    assert (result["pairs"], result["alike"], result["flipped"]) == (2, 1, 0)
    assert abs(result["position_bias"]) < 0.05
    assert result["label_mass"] > 0.9
    template = LanguageModel.load(ModelConfig(path=str(tmp_path / "judge"))).template
    assert len(load_comparisons(DataConfig(path=str(tmp_path / "judged.jsonl")), template).records) == 2


def test_a_judge_that_looks_at_the_position_alone_is_found_out_and_says_one_half(tmp_path: Path) -> None:
    teach(tmp_path, lambda a, b: 0)
    samples(tmp_path, *({"prompt": w, "responses": ["poor", "good"], "truncated": [False, False]} for w in WORDS))
    result = judge(recipe(tmp_path, "soft=false", "confidence=0.6"))
    assert result["position_bias"] > 0.45
    assert result["flipped"] == 1
    assert result["confidence"] < 0.55
    assert (result["pairs"], result["unsure"], judged(tmp_path)) == (0, len(WORDS), [])


@pytest.fixture
def raw(tmp_path: Path) -> tuple[LanguageModel, JudgeConfig, list[Pair]]:
    """An untrained judge of float64, and pairs."""
    tiny.folder(tmp_path / "judge", chat=True, dtype=torch.float64)
    config = recipe(tmp_path, "model.dtype=float64")
    pairs = [Pair(w, (f"it is {w}", f"no, {v}"), (False, False)) for w in WORDS[:3] for v in WORDS[3:5]]
    return LanguageModel.load(config.model, trainable=False), config, pairs


def test_preferences_are_the_renormalised_label_probabilities_of_the_plain_model(raw: Any) -> None:
    model, config, pairs = raw
    found = compare(model, ask(pairs, model.template, config), token_budget=10_000)
    plain = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float64)
    tokenizer = tiny.tokenizer(chat=True)
    a, b = (tokenizer.encode(letter)[0] for letter in "AB")
    for i, pair in enumerate(pairs):
        first = []
        for one, other in (pair.texts, pair.texts[::-1]):
            ids = tokenizer.encode(f"<|user|>{pair.prompt}|{one}|{other}|<|end|><|assistant|>")
            probabilities = torch.softmax(plain(torch.tensor([ids])).logits[0, -1].detach(), 0)
            first.append(float(probabilities[a] / (probabilities[a] + probabilities[b])))
        assert found.first[i].tolist() == pytest.approx(first, abs=1e-9)
        assert float(found.preference[i]) == pytest.approx((first[0] + 1 - first[1]) / 2, abs=1e-9)


def test_preferences_of_the_two_orders_sum_to_one_and_need_one_forward_pass(raw: Any) -> None:
    model, config, pairs = raw
    calls = []
    handle = model.plain.get_input_embeddings().register_forward_hook(lambda *_: calls.append(1))
    turned = [Pair(p.prompt, p.texts[::-1], p.truncated) for p in pairs]
    one, other = (compare(model, ask(way, model.template, config), token_budget=10_000) for way in (pairs, turned))
    handle.remove()
    assert torch.allclose(one.preference + other.preference, torch.ones(len(pairs), dtype=torch.float64), atol=1e-12)
    assert one.summary()["position_bias"] == pytest.approx(other.summary()["position_bias"], abs=1e-12)
    assert len(calls) == 2
    cut = compare(model, ask(pairs, model.template, config), token_budget=1)
    assert torch.allclose(cut.preference, one.preference, atol=1e-9)


def test_responses_are_shown_as_they_are_even_if_they_hold_placeholders() -> None:
    template = Template.of(tiny.tokenizer())
    config = JudgeConfig(samples="x", output="y", question="{prompt}; {first}: {a}; {second}: {b};")
    (both,) = ask([Pair("p {a}", ("x {b} \\1", "y {prompt}"), (False, False))], template, config)
    assert [group.prompt.text for group in both] == [
        "p {a}; A: x {b} \\1; B: y {prompt};", "p {a}; A: y {prompt}; B: x {b} \\1;",
    ]  # fmt: skip


def test_pairs_of_many_responses(tmp_path: Path) -> None:
    samples(tmp_path, {"prompt": [{"role": "user", "content": "hi"}], "responses": list("abcb"), "truncated": [False] * 4})
    pairs, alike = read_pairs(str(tmp_path / "samples.jsonl"), "all")
    assert [pair.texts for pair in pairs] == [("a", "b"), ("a", "c"), ("a", "b"), ("b", "c"), ("c", "b")]
    assert alike == 1
    neighbours, _ = read_pairs(str(tmp_path / "samples.jsonl"), "neighbours")
    assert [pair.texts for pair in neighbours] == [("a", "b"), ("c", "b")]
    rows = comparison_rows(neighbours, [0.5, 0.2], soft=True, confidence=0.5)
    assert rows == [{"prompt": [{"role": "user", "content": "hi"}], "chosen": "b", "rejected": "c", "probability": 0.8}]


def test_what_cannot_be_judged_is_refused_with_a_fix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.folder(tmp_path / "judge")
    good = {"prompt": "p", "responses": ["a", "b"], "truncated": [False, False]}
    samples(tmp_path, good, {"prompt": "p" * 300, "responses": ["a", "b"], "truncated": [False, False]})
    with pytest.raises(DataError, match="context of 256"):
        judge(recipe(tmp_path))
    assert judge(recipe(tmp_path, "on_long=skip", "confidence=0.5"))["too_long"] == 1
    with pytest.raises(ModelError, match="'yes' is 3 tokens"):
        judge(recipe(tmp_path, "on_long=skip", "labels=['yes', n]"))
    with pytest.raises(ModelError, match="same token"):
        judge(recipe(tmp_path, "on_long=skip", "labels=[n, n]"))
    with pytest.raises(ConfigError, match=r"does not show \{b\}"):
        recipe(tmp_path, "question='{prompt} {a}'")
    samples(tmp_path, {"prompt": "p", "responses": ["a", "a"]})
    with pytest.raises(DataError, match="no pair to judge"):
        judge(recipe(tmp_path))
    samples(tmp_path, {"prompt": "p"})
    assert main(["judge", f"samples={tmp_path / 'samples.jsonl'}", f"output={tmp_path / 'x'}", f"model.path={tmp_path / 'judge'}"]) == 2
    assert "samples.jsonl:1: there is no column 'responses'" in capsys.readouterr().err


@pytest.mark.slow
def test_the_default_model_answers_with_the_labels_and_its_position_bias_shows(tmp_path: Path) -> None:
    samples(
        tmp_path,
        {"prompt": "What is 2 + 2?", "responses": ["2 + 2 is 4.", "Purple elephants fly fly fly fly."], "truncated": [False, False]},
        {"prompt": "Name a fruit.", "responses": ["asdf jkl qwer", "An apple."], "truncated": [False, False]},
    )
    result = judge(JudgeConfig(samples=str(tmp_path / "samples.jsonl"), output=str(tmp_path / "judged.jsonl")))
    assert result["label_mass"] > 0.1
    assert result["position_bias"] > 0.2  # 135 M parameters do not make a judge, and the report says so
