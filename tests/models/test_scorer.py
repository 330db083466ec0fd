"""Scores are read at the end token (a cut-off response gets one), and load in plain transformers, also when pad is EOS."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import tiny
from trimtab.batch import Batch
from trimtab.models import loading
from trimtab.models.loading import LoraConfig, ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.types import Group, Prompt, Response

GROUP = Group(Prompt((7, 8, 9), ""), (Response((11, 12, 0), ""), Response((13, 0), ""), Response((20, 21, 22, 23), "", truncated=True)))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_saved_scorer_gives_the_same_scores_in_plain_transformers(architecture: str, lora: LoraConfig | None, tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base", architecture)
    scorer = Scorer.load(ModelConfig(path=str(tmp_path / "base"), dtype="float32", lora=lora), head="normal")
    ours = scorer.scores(Batch((GROUP,))).scores
    saved = scorer.save(tmp_path / "saved")
    if lora is not None:  # loading an adapter merges it
        saved = Scorer.load(ModelConfig(path=str(saved), dtype="float32"), head="saved").save(tmp_path / "merged")
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(saved), AutoTokenizer.from_pretrained(saved)
    assert tokenizer.pad_token_id == 0 != model.config.pad_token_id  # a batch padded with EOS would be read one token early
    rows = [[*GROUP.prompt.tokens, *r.tokens, *([0] if r.truncated else [])] for r in GROUP.responses]
    width = max(map(len, rows))
    ids = torch.tensor([row + [model.config.pad_token_id] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    theirs = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_values_are_read_before_every_token(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base")
    scorer = Scorer.load(ModelConfig(path=str(tmp_path / "base"), dtype="float64"), head="normal")
    values = scorer.values(Batch((GROUP,))).values
    prefixes = [GROUP.only([i]).responses[0].tokens[:t] for i in range(3) for t in range(len(GROUP.responses[i].tokens))]
    # V(x, y_<t) is read at the prefix's last token; an empty prefix is the prompt's last token
    for value, prefix in zip(values, prefixes, strict=True):
        ids = torch.tensor([[*GROUP.prompt.tokens, *prefix]])
        with loading.plain_attention(scorer.plain) as plain:
            states = plain.base_model(ids).last_hidden_state[0, -1]
        assert value.item() == pytest.approx(scorer.head(states).item(), abs=1e-6)


def test_a_new_critic_starts_at_zero_and_a_reward_head_does_not(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), dtype="float32")
    assert (Scorer.load(config, head="zero").values(Batch((GROUP,))).values == 0).all()
    assert Scorer.load(config, head="normal").head.weight.std().item() == pytest.approx(1 / 33**0.5, rel=0.4)


def test_gain_and_bias_reach_every_reading_and_are_kept(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base")
    scorer = Scorer.load(ModelConfig(path=str(tmp_path / "base"), dtype="float32"), head="normal", heads=2)
    readings = {"scores": scorer.scores, "values": scorer.values, "token_scores": scorer.token_scores}
    raw = scorer.scores(Batch((GROUP,))).members
    plain = {name: getattr(read(Batch((GROUP,))), name) for name, read in readings.items()}
    scorer.normalise([4.0, 4.0], [0.0, 0.0])
    scorer.normalise([0.5, 0.5], [1.0, 1.0])  # on top of the first: 0.5 (4 r) + 1
    for name, read in readings.items():
        assert torch.allclose(getattr(read(Batch((GROUP,))), name), 2 * plain[name] + 1, atol=1e-6)
    again = Scorer.load(ModelConfig(path=str(scorer.save(tmp_path / "saved")), dtype="float32"), head="saved")
    assert torch.allclose(again.scores(Batch((GROUP,))).members, 2 * raw + 1, atol=1e-6)
    assert Scorer.load(ModelConfig(path=str(tmp_path / "saved"), dtype="float32"), head="zero").heads == 1  # a new head is plain
