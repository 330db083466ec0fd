"""A reference's log-probabilities are read from disk only where they are exactly what would be computed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab.batch import Batch
from trimtab.config import load_recipe
from trimtab.data.templates import Template
from trimtab.models import loading, reference_cache
from trimtab.models.language import LanguageModel
from trimtab.models.loading import LoraConfig
from trimtab.models.reference_cache import ReferenceCache, data_hash, model_hash
from trimtab.stages.preference import preference, preference_config
from trimtab.types import Group, Prompt, Response

GROUPS = tuple(Group(Prompt((5 + i, 9), ""), (Response((3, 7 + i, 0), ""), Response((8,) * (i + 1) + (0,), ""))) for i in range(4))
BUDGET = 30


def language_model(**changes: Any) -> LanguageModel:
    return LanguageModel(tiny.model("llama", **{"dtype": torch.float32, **changes}), Template.of(tiny.tokenizer()))


def looked(cache: ReferenceCache, model: LanguageModel, groups: tuple[Group, ...] = GROUPS, budget: int = BUDGET) -> tuple[Any, str]:
    with torch.no_grad():
        return cache.column(Batch(groups), budget, lambda: model.forward(Batch(groups)).logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_read_is_what_was_computed_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    model = language_model(dtype=dtype)
    computed, first = looked(ReferenceCache(tmp_path, model), model)
    read, second = looked(ReferenceCache(tmp_path, model), model)
    assert (first, second) == ("computed", "read")
    assert read.dtype == computed.dtype
    assert torch.equal(read, computed)


def test_any_changed_weight_token_order_or_budget_is_another_entry(tmp_path: Path) -> None:
    model = language_model()
    looked(ReferenceCache(tmp_path, model), model)
    assert looked(ReferenceCache(tmp_path, model), model, budget=BUDGET + 1)[1] == "computed"
    assert looked(ReferenceCache(tmp_path, model), model, GROUPS[::-1])[1] == "computed"
    other = replace(GROUPS[2], responses=(Response((3, 9, 1), ""), GROUPS[2].responses[1]))
    assert looked(ReferenceCache(tmp_path, model), model, (*GROUPS[:2], other, *GROUPS[3:]))[1] == "computed"
    with torch.no_grad():
        next(iter(model.model.parameters())).view(-1)[17] += 1e-6
    assert looked(ReferenceCache(tmp_path, model), model)[1] == "computed"


def test_where_a_prompt_ends_matters() -> None:
    shifted = Group(Prompt((5,), ""), (Response((9, 3, 7, 0), ""),)), Group(Prompt((5, 9), ""), (Response((3, 7, 0), ""),))
    together = Group(Prompt((5,), ""), (Response((9,), ""), Response((3,), ""))), Group(Prompt((5,), ""), (Response((9, 3), ""),))
    assert len({data_hash([group]) for group in (*shifted, *together)}) == 4


def test_architecture_and_precision_are_part_of_the_model() -> None:
    same = model_hash(language_model()), model_hash(language_model())
    changes = [{"rms_norm_eps": 1e-3}, {"dtype": torch.bfloat16}, {"seed": 1}, {"num_hidden_layers": 1}]
    others = [language_model(**change) for change in changes]
    assert same[0] == same[1]
    assert len({same[0], *(model_hash(other) for other in others)}) == 1 + len(others)


def test_an_adapter_that_changes_nothing_yet_is_no_other_model() -> None:
    plain = language_model()
    adapted = LanguageModel(loading.add_adapter(tiny.model("llama"), LoraConfig(rank=2), "CAUSAL_LM"), plain.template)
    assert model_hash(adapted) == model_hash(plain)
    assert torch.equal(adapted.forward(Batch(GROUPS)).logprobs, plain.forward(Batch(GROUPS)).logprobs)
    with torch.no_grad():
        next(p for name, p in adapted.model.named_parameters() if "lora_B" in name).view(-1)[0] = 1.0
    assert model_hash(adapted) != model_hash(plain)


@pytest.mark.parametrize("file", [reference_cache.COLUMN, reference_cache.MANIFEST])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_entry_is_computed_again_and_mended(tmp_path: Path, file: str, damage: str) -> None:
    model = language_model()
    before, _ = looked(ReferenceCache(tmp_path, model), model)
    (path,) = tmp_path.glob(f"*/{file}")
    raw = bytearray(path.read_bytes())
    raw[-10] ^= 1
    path.write_bytes(raw[:-10] if damage == "cut" else raw)
    if damage == "gone":
        path.unlink()
    again, found = looked(ReferenceCache(tmp_path, model), model)
    assert found == "damaged"
    assert torch.equal(before, again)
    assert looked(ReferenceCache(tmp_path, model), model)[1] == "read"


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    model = language_model()
    column, found = looked(ReferenceCache(tmp_path / "file", model), model)
    assert found == "not kept"
    assert torch.isfinite(column).all()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model", scale=1.0)
    rows = [{"prompt": f"{w}?", "chosen": f"good {w}", "rejected": "bad"} for w in ("apple", "river", "stone", "cloud")]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(place: Path, name: str, *overrides: str, cache: str | None = "cache") -> tuple[list[dict[str, float]], dict[str, Any]]:
    """Train for two steps: the metrics, and what is told of the reference."""
    tracker = tiny.Recorder()
    settings = [
        f"model.path={place / 'model'}", "model.dtype=float32", f"data.path={place / 'pairs.jsonl'}", "output=unused", "fit.steps=2",
        "optim.lr=1e-3", f"reference_cache={place / cache if cache else 'null'}",
    ]  # fmt: skip
    preference(name, load_recipe(preference_config(name), None, [*settings, *overrides]), place / "run", tracker)
    rows = [{key: value for key, value in row.items() if not key.startswith("time/")} for row in tracker.metrics]
    return rows, next((details for kind, details in tracker.events if kind == "reference"), {})


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_a_run_from_the_cache_is_the_run_without_it(place: Path, name: str) -> None:
    without, told = run(place, name, "data.holdout=0.3", cache=None)
    computed, first = run(place, name, "data.holdout=0.3")
    read, second = run(place, name, "data.holdout=0.3")
    assert without == computed == read
    assert [x["logprobs"] for x in (told, first, second)] == ["computed", "computed", "read from cache"]
    assert second["seconds"] > 0


def test_another_seed_and_another_loss_read_what_a_first_run_computed(place: Path) -> None:
    run(place, "dpo")
    for name, overrides in (("dpo", ["seed=3"]), ("ipo", ["algorithm.tau=0.3"]), ("dpo", ["model.lora={rank: 2}"])):
        assert run(place, name, *overrides)[1]["logprobs"] == "read from cache"
    assert run(place, "tr_dpo")[1] == {}  # its reference moves
    assert run(place, "dpo", "data.limit=3")[1]["logprobs"] == "computed"


def test_a_run_says_that_its_cache_was_damaged(place: Path) -> None:
    run(place, "dpo")
    for path in (place / "cache").glob(f"*/{reference_cache.COLUMN}"):
        path.write_bytes(b"no such thing")
    assert "damaged" in run(place, "dpo")[1]["cache"]
    assert "cache" not in run(place, "dpo")[1]
