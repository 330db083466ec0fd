"""The benchmark's arithmetic: which rows both sides read, what a step must cost, and when work counts as equal."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench.ablate import SWITCHES, mask_of
from bench.compare import CHECKS, micro_tokens, unequal
from bench.data import EOS, FIRST_TOKEN, as_text, in_steps, packed_tokens, plain_tokens, rows_of
from bench.models import _tokenizer
from bench.ours import groups_of
from bench.table import cells, table
from bench.works import WORKS, Work
from torch.utils.flop_counter import FlopCounterMode

import tiny
from bench import flops
from trimtab.batch import Batch
from trimtab.models.packed import Layout

DPO = WORKS["dpo"]
SHAPE = flops.Shape(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, inner=64, vocabulary=128)


def row(prompt: int, *responses: int) -> dict[str, list[object]]:
    return {"prompt": [5] * prompt, "responses": [[6] * n for n in responses]}


def test_rows_have_the_stated_lengths_and_are_the_same_every_time() -> None:
    rows = rows_of(DPO, 50, 1000)
    assert rows == rows_of(DPO, 50, 1000)
    assert rows != rows_of(DPO, 50, 1000, seed=1)
    prompts, answers = [len(r["prompt"]) for r in rows], [len(a) for r in rows for a in r["responses"]]
    assert 30 <= min(prompts) < 40 < 250 < max(prompts) <= 300
    assert 20 <= min(answers) < 30 < 250 < max(answers) <= 300
    assert sum(n < 95 for n in prompts) == pytest.approx(len(rows) / 2, rel=0.15)  # log-uniform: the median is sqrt(30 x 300)
    assert all(a[-1] == EOS and min(a[:-1]) >= FIRST_TOKEN for r in rows for a in r["responses"])


def test_the_rows_of_a_step_do_not_depend_on_how_many_steps_follow() -> None:
    assert in_steps(rows_of(DPO, 2, 1000), DPO.rows) == in_steps(rows_of(DPO, 6, 1000), DPO.rows)[:2]


def test_tokens_are_counted_once_packed_and_once_per_response_plain() -> None:
    assert packed_tokens([row(10, 3, 4)]) == 17
    assert plain_tokens([row(10, 3, 4)]) == 27


def test_texts_given_to_a_peer_become_the_same_ids(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 400, "model_type": "llama"}))
    _tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = [*range(FIRST_TOKEN, 400, 7), 116, 161, EOS]
    assert tokenizer(as_text(ids))["input_ids"] == ids
    assert tokenizer(as_text(ids[:5]) + " " + as_text(ids[5:]))["input_ids"] == ids
    assert tokenizer.eos_token_id == EOS


def test_looks_are_the_pairs_that_attention_must_see() -> None:
    for prompt, response in ((0, 5), (7, 1), (7, 4)):
        pairs = [(q, k) for q in range(prompt, prompt + response) for k in range(q + 1)]
        assert flops.looks(prompt, response) == len(pairs)


def test_operations_are_those_that_torch_counts() -> None:
    """The matrix products of layers and head, forward, as counted while the packed model runs; attention is held against its mask."""
    from trimtab.data.templates import Template
    from trimtab.models.language import LanguageModel

    model = LanguageModel(tiny.model("llama"), Template.of(tiny.tokenizer(), "plain"))
    rows = [row(9, 5, 3), row(4, 6, 2)]
    batch = Batch(tuple(groups_of(rows)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.forward(batch)
    counted = sum(n for name, n in counter.get_flop_counts()["Global"].items() if str(name) in ("aten.mm", "aten.addmm"))
    layout = Layout.of(batch.groups, keep_last=False)
    attention = SHAPE.attention(int(mask_of(layout).sum()))
    assert flops.forward(SHAPE, rows) == counted + attention


def test_a_shared_prompt_and_an_absent_reference_are_not_paid() -> None:
    pair, apart = [row(50, 10, 12)], [row(50, 10), row(50, 12)]
    saved = 2 * SHAPE.body_weights * 50 + SHAPE.attention(flops.looks(0, 50))
    assert flops.forward(SHAPE, apart) - flops.forward(SHAPE, pair) == pytest.approx(saved)
    assert flops.step(SHAPE, DPO, pair) == pytest.approx(4 / 3 * flops.step(SHAPE, WORKS["dpo-precomputed"], pair))
    assert flops.step(SHAPE, WORKS["rloo"], pair) > flops.step(SHAPE, WORKS["grpo"], pair)
    sampled = flops.forward(SHAPE, pair)
    assert flops.step(SHAPE, WORKS["grpo"], pair) == pytest.approx(sampled + 3 * sampled)
    assert flops.learning(SHAPE, WORKS["rloo"], pair) == pytest.approx(4 * sampled)
    critic = flops.forward(SHAPE, pair, head=False)
    assert flops.learning(SHAPE, WORKS["ppo"], pair) == pytest.approx(4 * sampled + 3 * critic)


def test_the_decode_bound_is_reading_or_computing_whichever_is_longer() -> None:
    rows = [row(16, *[8] * 4)]
    reading = flops.decode_bound(SHAPE, rows, gemm=1e30, bandwidth=1e9)
    weights = 2 * (SHAPE.body_weights + SHAPE.head_weights)
    assert reading > 8 * weights / 1e9
    assert reading < 8 * weights / 1e9 * 1.5
    computing = flops.decode_bound(SHAPE, rows, gemm=1e9, bandwidth=1e30)
    generated = [{"prompt": [5] * 16, "responses": [[6] * 9] * 4}]  # the last token is sampled, not read
    assert computing == pytest.approx(flops.forward(SHAPE, generated) / 1e9, rel=0.1)


def test_every_promised_work_is_there_and_its_search_starts_inside_its_axes() -> None:
    names = "sft reward dpo dpo-precomputed dpo-long dpo-17m grpo rloo ppo decode-transformers decode-vllm"
    assert list(WORKS) == names.split()
    for work in WORKS.values():
        assert work.kind in CHECKS
        for axis, values in work.axes:
            assert work.start[axis] in values


def test_a_work_survives_the_way_to_its_worker() -> None:
    for work in WORKS.values():
        arrived = Work(**json.loads(json.dumps(work.as_json())))
        assert json.dumps(arrived.as_json()) == json.dumps(work.as_json())


def test_unequal_work_is_named_and_equal_work_is_not() -> None:
    ours = {"logprob/chosen": -1000.0, "logprob/rejected": -900.0}
    assert not unequal("dpo", ours, {"logps/chosen": -1001.0, "logps/rejected": -899.0})
    assert "logps/rejected" in unequal("dpo", ours, {"logps/chosen": -1001.0, "logps/rejected": -880.0})
    assert unequal("decode", {"response/tokens": 2048.0}, {"response/tokens": 1900.0})


def test_the_peers_largest_micro_batch_counts_its_padding() -> None:
    steps = [[row(10, 5, 7), row(20, 1, 1)]]
    assert micro_tokens(DPO, steps, {"micro": 1}) == 2 * 21
    assert micro_tokens(DPO, steps, {"micro": 2}) == 4 * 21
    assert micro_tokens(WORKS["grpo"], steps, {"micro": 2}) == 2 * (20 + WORKS["grpo"].new)
    assert micro_tokens(WORKS["decode-transformers"], steps, {}) is None


def test_a_row_that_was_not_measured_says_so() -> None:
    shown = table([{"work": "ppo", "peer": "trl 1.12.0", "failed": "not in .trl/"}])
    assert "NOT MEASURED: not in .trl/" in shown
    assert len(cells({"work": "ppo", "peer": "x", "failed": "y"})) == shown.splitlines()[0].count("|") - 1


def test_the_mask_of_the_ablation_is_the_packed_models_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """With SDPA and this mask instead of blocks, the log-probabilities are the same: only the factor is switched off."""
    from trimtab.data.templates import Template
    from trimtab.models import fused
    from trimtab.models.language import LanguageModel

    monkeypatch.setattr(fused, "_parameters", fused._parameters)  # which the ablation replaces
    model = LanguageModel(tiny.model("llama", dtype=torch.float64), Template.of(tiny.tokenizer(), "plain"))
    batch = Batch(tuple(groups_of([row(9, 5, 3), row(4, 6, 2)])))
    with torch.no_grad():
        expected = model.forward(batch).logprobs
        own, packed = Layout.attend, SWITCHES["attention of our own"].patch
        assert packed is not None
        try:
            packed()
            found = model.forward(batch).logprobs
        finally:
            Layout.attend = own  # type: ignore[method-assign]
    assert expected is not None
    assert found is not None
    assert torch.allclose(expected, found, atol=1e-6)


@pytest.mark.parametrize("name", ["shared prompt", "no padding", "head on responses", "logits in chunks"])
def test_switching_a_factor_off_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.data.templates import Template
    from trimtab.maths import logprobs as chunks
    from trimtab.models import language
    from trimtab.models.language import LanguageModel

    model = LanguageModel(tiny.model("llama", dtype=torch.float64), Template.of(tiny.tokenizer(), "plain"))
    batch = Batch(tuple(groups_of([row(9, 5, 3), row(4, 6, 2)])))
    expected = model.forward(batch).logprobs
    for owner, attribute in (
        (Layout, "of"), (LanguageModel, "predictors"), (LanguageModel, "forward"), (language, "token_logprobs"),
        (chunks, "PART_BYTES"), (chunks, "SLICE_ELEMENTS"), (chunks, "products"), (chunks, "kernels"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, attribute, vars(owner)[attribute])  # restored after the test
    patch = SWITCHES[name].patch
    assert patch is not None
    patch()
    found = model.forward(batch).logprobs
    assert expected is not None
    assert found is not None
    assert torch.allclose(expected, found, atol=1e-6)


def test_every_ablation_is_of_a_work_there_is() -> None:
    for switch in SWITCHES.values():
        assert set(switch.works) <= set(WORKS)
        for name in switch.works:
            replace(WORKS[name], **switch.work)
