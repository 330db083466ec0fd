"""A small model that really learned something: it is read rightly, continues sensibly, and gets better at what it is taught."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from trimtab.batch import Batch
from trimtab.models import loading
from trimtab.models.language import LanguageModel, plain_logprobs
from trimtab.models.loading import ModelConfig
from trimtab.stages.sample import SampleConfig, sample
from trimtab.stages.sft import SFTConfig, sft
from trimtab.types import Group

OPENING = "Once upon a time, there was a little girl named"
ENDING = " Lily. She loved to play outside in the park."


@pytest.fixture
def stories(shared: Path) -> Path:
    return shared / "models" / "stories260k"


def test_a_story_is_probable_and_packed_equals_plain(stories: Path) -> None:
    model = LanguageModel.load(ModelConfig(path=str(stories), dtype="float64"), trainable=False)
    prompt = model.template.prompt(OPENING)
    likely, unlikely = (model.template.response(prompt, text, truncated=True) for text in (ENDING, " zq xvw kjq"))

    batch = Batch((Group(prompt, (likely, unlikely)),))
    logprobs = model.forward(batch).logprobs
    with loading.plain_attention(model.plain) as plain:
        assert (logprobs[: len(likely.tokens)] - plain_logprobs(plain, prompt.tokens, likely.tokens)).abs().max() < 1e-6
    assert float(logprobs[: len(likely.tokens)].mean()) > -1.0  # 0.4 to 1 nats a token; uniform would be 6.2
    assert float(logprobs[len(likely.tokens) :].mean()) < -3.0


def test_greedy_continuation_is_a_story(stories: Path) -> None:
    greedy = SampleConfig(model=ModelConfig(path=str(stories)), prompt="Once upon a time", sampling={"temperature": 0, "max_tokens": 40})
    (group,) = sample(greedy)
    assert "there was a little" in group.responses[0].text


def test_sft_lowers_the_loss_on_held_out_text(stories: Path, shared: Path, tmp_path: Path) -> None:
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()[:40_000]
    rows = [{"text": text[i : i + 200]} for i in range(0, len(text), 200)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = SFTConfig(
        model=ModelConfig(path=str(stories), dtype="float32"),
        data={"path": str(tmp_path / "text.jsonl"), "holdout": 0.2},
        fit={"batch_size": 16, "steps": 20, "eval_every": 10},
        optim={"lr": 2e-3},
    )
    tracker = tiny.Recorder()
    sft(config, tmp_path / "run", tracker)
    before, after = tracker.metrics[9]["eval/nll"], tracker.metrics[19]["eval/nll"]
    assert after < before < tracker.metrics[0]["loss/nll"]
