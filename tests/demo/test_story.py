"""The demo from end to end on a tiny model, and its annotator."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

import tiny
from trimtab.demo.annotator import SimulatedAnnotator
from trimtab.demo.story import HELD_OUT, PROMPTS, DemoConfig, demo
from trimtab.types import Group, Prompt, Response

KEYS = {"prompts", "proxy_reward", "gold_reward", "gold_delta", "gold_delta_low", "gold_delta_high", "win_rate", "kl", "distinct2_ratio",
        "perplexity_under_reference"}  # fmt: skip


def small(folder: Path, model: Path, **changes: object) -> DemoConfig:
    sizes = {"prompts": 12, "held_out": 6, "max_tokens": 6, "responses_per_prompt": 3, "ppo_steps": 2, "best_of": 2, "reward_layers": 1}
    return DemoConfig(output=str(folder), model=str(model), **{**sizes, **changes})


def test_the_story_has_every_figure_and_repeats_with_its_seed(tmp_path: Path) -> None:
    model = tiny.folder(tmp_path / "model")
    summary = demo(small(tmp_path / "a", model))
    assert json.loads((tmp_path / "a" / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for name in ("start", "dpo", "ppo", "best_of_n"):
        assert summary[name].keys() >= KEYS
        assert all(math.isfinite(value) for value in summary[name].values())
        assert summary[name]["prompts"] == 6
    assert summary["start"]["gold_delta"] == 0
    assert summary["start"]["win_rate"] == 0.5
    assert summary["start"]["kl"] == pytest.approx(0, abs=1e-5)
    assert summary["stage_seconds"].keys() >= {"sample", "annotate", "reward", "ppo", "dpo", "evaluate"}
    assert summary["reward_model_accuracy"].keys() == {"accuracy", "low", "high", "pairs"}
    html = (tmp_path / "a" / "report.html").read_text()
    assert "simulated" in html
    split = html.partition("<h2>Time of a step</h2>")[2].partition("</section>")[0]
    assert all(part in split for part in ("PPO: ", "DPO: ", "reward: ", "generate", "observe", "update", "forward", "backward"))

    stages = ("reward", "ppo", "dpo")
    first = {stage: timeless(tmp_path / "a" / stage / "metrics.jsonl") for stage in stages}
    demo(small(tmp_path / "a", model))  # again, in the same folder
    assert {stage: timeless(tmp_path / "a" / stage / "metrics.jsonl") for stage in stages} == first
    demo(small(tmp_path / "c", model, seed=1))
    assert timeless(tmp_path / "a/ppo/metrics.jsonl") != timeless(tmp_path / "c/ppo/metrics.jsonl")


def timeless(path: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in path.read_text().splitlines()]


def test_prompts_are_distinct_neutral_openings() -> None:
    prompts = [json.loads(line)["prompt"] for line in PROMPTS.read_text().splitlines()]
    assert len(prompts) == len(set(prompts)) >= HELD_OUT + 150
    annotator = SimulatedAnnotator()
    assert all(abs(annotator.gold(prompt)) < 0.2 and prompt == prompt.strip() for prompt in prompts)


def group(*texts: str, prompt: str = "p") -> Group:
    return Group(Prompt((1,), prompt), tuple(Response((1,), text) for text in texts))


def test_the_annotators_noise_is_bradley_terry() -> None:
    annotator, n, temperature = SimulatedAnnotator(), 2000, 0.5
    good, plain = "a good day", "a day"
    groups = [group(good, plain, prompt=str(i)) for i in range(n)]
    chosen = sum(c.group.responses[0].text == good for c in annotator.rank(groups, temperature, seed=0)) / n
    expected = 1 / (1 + math.exp(-(annotator.gold(good) - annotator.gold(plain)) / temperature))
    assert abs(chosen - expected) < 3 * np.sqrt(expected * (1 - expected) / n)


def test_without_noise_the_order_is_the_gold_order() -> None:
    annotator = SimulatedAnnotator()
    (ranked,) = annotator.rank([group("a terrible day", "a wonderful day", "a day", "a day")], 1e-6, seed=0)
    assert [r.text for r in ranked.group.responses] == ["a wonderful day", "a day", "a terrible day"]
    assert annotator.agreement([ranked]) == 1.0
    assert annotator.rank([group("same", "same")], 0.2, seed=0) == []


def test_an_opinion_does_not_depend_on_the_company_it_comes_in() -> None:
    annotator = SimulatedAnnotator()
    groups = [group("one good thing", "one bad thing", "one thing", prompt=str(i)) for i in range(6)]
    together = annotator.rank(groups, 0.3, seed=4)
    assert [annotator.rank([g], 0.3, seed=4)[0] for g in groups] == together
