"""Every registered preference loss on a tiny real model in float64: what a loss must hold is tested by being registered."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab.algorithms import PREFERENCES
from trimtab.batch import Batch, Counts, Outputs
from trimtab.config import load_recipe
from trimtab.data.records import load_comparisons
from trimtab.errors import DataError
from trimtab.models.language import LanguageModel, plain_logprobs
from trimtab.models.loading import ModelConfig
from trimtab.models.reference import MovingReference
from trimtab.stages import preference as stage
from trimtab.stages.preference import PreferenceLearning, desirability, preference, preference_config
from trimtab.training.update import Ahead
from trimtab.types import Comparison, Group, Prompt, Response

WORDS = ["apple", "river", "stone", "cloud", "table", "horse"]
TOKENIZER = tiny.tokenizer()
EVERY = list(PREFERENCES)
LABELLED = [name for name in EVERY if getattr(PREFERENCES[name].load(), "data", None) == "labels"]
# settings under which what a loss has of its own is at work in a few steps
OWN = {
    "tr_dpo": ["algorithm.reference.every=2"],
    "dpo": ["algorithm.label_smoothing=0.1", "algorithm.nll_weight=0.5"],
    "kto": ["algorithm.nll_weight=0.1"],
    "sppo": ["algorithm.beta=0.1"],
    "cpo": ["algorithm.beta=2"],
    "discopop": ["algorithm.tau=1"],  # a smaller one draws a margin of zero down
    "mixture": ["algorithm.members={dpo: 0.8, bco: 0.2, kto: 0.5, aot: 0.3, ld_dpo: 0.1, nll: 1.0}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.folder(tmp_path_factory.mktemp("model") / "tiny", scale=1.0, dtype=torch.float64, num_hidden_layers=1)


@pytest.fixture(scope="module")
def exact_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 computes all of it in float64; Llama's norms and rotary embeddings do not."""
    return tiny.folder(tmp_path_factory.mktemp("exact") / "tiny", "gpt2", scale=1.0, dtype=torch.float64, n_layer=1)


def encode(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER.encode(text, add_special_tokens=False))


def comparisons() -> list[Comparison]:
    """Pairs, and two rankings of three with a tie, of very different lengths; one response has turns that are not the assistant's."""
    found = []
    for i, word in enumerate(WORDS):
        prompt = Prompt((1, *encode(f"{word}?")), f"{word}?")
        texts = [f"good {word}" + " yes" * (i % 3), f"bad {WORDS[i - 1]}", "bad no"][: 3 if i % 4 == 0 else 2]
        responses = [Response((*encode(text), 0), text) for text in texts]
        if i == 1:
            own = [k % 5 != 2 for k in range(len(responses[0].tokens))]
            responses[0] = replace(responses[0], mask=(*own[:-1], False))
        scores = (2.0, 1.0, 1.0) if i == 4 else (2.0, 1.0, 0.0)
        kind: Any = "ranking" if len(texts) == 3 else "pair"
        found.append(Comparison(Group(prompt, tuple(responses)), scores if len(texts) == 3 else (1.0, 0.0), kind))
    return found


def labelled() -> list[Comparison]:
    """The same responses one by one, with a label each; more undesirable than desirable ones."""
    return [
        Comparison(Group(c.group.prompt, (response,)), (float(score == max(c.scores)),), "binary")
        for c in comparisons()
        for response, score in zip(c.group.responses, c.scores, strict=True)
    ]


@cache
def loaded(folder: Path) -> LanguageModel:
    return LanguageModel.load(ModelConfig(path=str(folder), dtype="float64"), template="plain")


def recipe(name: str, folder: Path, *overrides: str) -> Any:
    settings = [f"model.path={folder}", "model.dtype=float64", "data.path=unused", "output=unused", "fit.batch_size=100", "optim.lr=1e-3"]
    return load_recipe(preference_config(name), None, [*settings, *OWN.get(name, []), *overrides])


def learn(
    name: str,
    folder: Path,
    run: Path,
    records: Sequence[Comparison],
    *overrides: str,
    holdout: Sequence[Comparison] = (),
    repeated: bool = False,
) -> tuple[dict[str, torch.Tensor], tiny.Recorder, PreferenceLearning]:
    """Train on records; returns the weights, the tracker and the learner."""
    config, tracker = recipe(name, folder, *overrides), tiny.Recorder()
    model = copy.deepcopy(loaded(folder))
    if repeated:
        model.forward = one_by_one(model.forward)
    learner = PreferenceLearning(name, config, model, records, holdout, tracker)
    learner.fit(run, tracker)
    return {key: p.detach().clone() for key, p in model.trainable().items()}, tracker, learner


def one_by_one(forward: Any) -> Any:
    """A forward pass that reads every response behind a prompt of its own."""

    def read(batch: Batch, **options: Any) -> Outputs:
        alone = [Batch((Group(g.prompt, (r,)),)) for g in batch.groups for r in g.responses]
        return Outputs(torch.cat([forward(one, **options).logprobs for one in alone]))

    return read


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[key] - b[key]).detach().abs().max()) for key in a)


CASES = [(name, "pairs") for name in EVERY] + [(name, "labels") for name in LABELLED]


@pytest.mark.parametrize(("name", "data"), CASES)
def test_micro_batches_and_order_change_nothing(name: str, data: str, folder: Path, tmp_path: Path) -> None:
    records = comparisons() if data == "pairs" else labelled()
    common = ("fit.steps=3", "optim.schedule=constant", "optim.eps=1e-3")  # Adam would blow rounding up with a smaller eps
    one, tracker, _ = learn(name, folder, tmp_path / "a", records, *common, "fit.micro_batch_tokens=100000")
    many, other, _ = learn(name, folder, tmp_path / "b", records, *common, "fit.micro_batch_tokens=1", "seed=3")
    assert furthest(one, many) < 1e-9
    for row, again in zip(tracker.metrics, other.metrics, strict=True):
        rounding = {"train/accuracy"} if abs(row["train/margin"]) < 1e-9 else set()  # at the reference, rounding decides
        same = [key for key in row if "time/" not in key and key not in rounding]
        assert [row[key] for key in same] == pytest.approx([again[key] for key in same])
    assert furthest(one, loaded(folder).trainable()) > 1e-6  # and something was learnt


@pytest.mark.parametrize(("name", "data"), CASES)
def test_a_shared_prompt_is_as_good_as_repeated_ones(name: str, data: str, exact_folder: Path, tmp_path: Path) -> None:
    records = comparisons() if data == "pairs" else labelled()
    common = ("fit.steps=2", "optim.schedule=constant", "optim.eps=1e-3")
    shared, _, _ = learn(name, exact_folder, tmp_path / "a", records, *common)
    repeated, _, _ = learn(name, exact_folder, tmp_path / "b", records, *common, repeated=True)
    assert furthest(shared, repeated) < 1e-9
    assert furthest(shared, loaded(exact_folder).trainable()) > 1e-6


@pytest.mark.parametrize("name", ["kto", "bco", "aot"])
def test_learning_from_what_the_loss_had_to_know_changes_nothing_bit_for_bit(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("fit.steps=3", "fit.batch_size=4", "fit.micro_batch_tokens=60")
    kept, tracker, _ = learn(name, folder, tmp_path / "a", comparisons(), *common)
    monkeypatch.setattr(Ahead, "serves", staticmethod(lambda *_: False))
    again, other, _ = learn(name, folder, tmp_path / "b", comparisons(), *common)
    assert all(torch.equal(kept[key], again[key]) for key in kept)
    assert [row["train/margin"] for row in tracker.metrics] == [row["train/margin"] for row in other.metrics]


@pytest.mark.parametrize(("name", "data"), CASES)
def test_what_is_masked_changes_nothing_bit_for_bit(name: str, data: str, folder: Path, tmp_path: Path) -> None:
    records = comparisons() if data == "pairs" else labelled()
    before, _, _ = learn(name, folder, tmp_path / "a", records, "fit.steps=2")
    place = next(i for i, c in enumerate(records) if c.group.responses[0].mask)
    group = records[place].group
    masked = group.responses[0]
    changed = replace(masked, tokens=(*masked.tokens[:-1], 77))  # the last token: nothing of the answer follows it
    records[place] = replace(records[place], group=replace(group, responses=(changed, *group.responses[1:])))
    after, _, _ = learn(name, folder, tmp_path / "b", records, "fit.steps=2")
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", EVERY)
def test_masked_log_probabilities_get_no_gradient_and_have_no_say(name: str) -> None:
    records, algorithm = comparisons(), PREFERENCES[name].load()
    algorithm = algorithm(algorithm.Config(), name)
    batch, generator = Batch(tuple(c.group for c in records)), torch.Generator().manual_seed(0)
    tokens = len(batch.mask)
    column, noise = (-torch.rand(tokens, dtype=torch.float64, generator=generator) for _ in range(2))

    def value(now: torch.Tensor, ref: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = now.clone().requires_grad_()
        judged = batch.with_tokens(logprobs_ref=ref, logprobs_now=now).with_responses(
            judgement=torch.tensor([s for c in records for s in c.scores], dtype=torch.float64),
            desirable=torch.tensor([x for c in records for x in desirability(c, 0.0)], dtype=torch.float64),
        )
        judged = algorithm.prepare(judged, judged)
        loss = algorithm.loss(Outputs(leaf), judged, Counts.of(judged)).value
        loss.backward()
        return loss.detach(), leaf.grad

    ref = column - 0.1
    state = algorithm.state_dict()
    loss, grad = value(column, ref)
    algorithm.load_state_dict(state)
    again, same = value(torch.where(batch.mask, column, noise - 3), torch.where(batch.mask, ref, noise - 9))
    assert torch.equal(loss, again)
    assert torch.equal(grad, same)
    assert (grad[~batch.mask] == 0).all()
    assert bool((~batch.mask).any())
    assert bool((grad != 0).any())


@pytest.mark.parametrize(("name", "data"), CASES)
def test_a_few_steps_lower_the_loss_and_raise_the_accuracy(name: str, data: str, folder: Path, tmp_path: Path) -> None:
    records = comparisons() if data == "pairs" else labelled()
    unseen = [replace(c, group=replace(c.group, prompt=replace(c.group.prompt, tokens=(1, *encode("seven?"))))) for c in records]
    _, tracker, _ = learn(name, folder, tmp_path / "run", records, "fit.steps=16", "optim.lr=1e-2", holdout=unseen)
    first, last = tracker.metrics[0], tracker.metrics[-1]
    assert last[f"loss/{name}"] < first[f"loss/{name}"]
    assert last["train/accuracy"] > (0.9 if data == "pairs" else 0.7)  # KTO's sigmoids are soon flat
    assert last["train/margin"] > first["train/margin"]
    assert last["eval/accuracy"] > 0.8
    assert last["eval/accuracy_low"] < last["eval/accuracy"] <= last["eval/accuracy_high"] + 1e-9
    assert math.isfinite(last["eval/loss"])
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoints/last/model")
    assert torch.isfinite(saved(torch.tensor([[5, 6]])).logits).all()


@pytest.mark.parametrize("name", EVERY)
def test_a_reference_is_looked_at_only_where_there_is_one(name: str, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    looked: list[int] = []
    plain = stage.observe

    def counted(batch: Batch, *args: Any, **more: Any) -> Outputs:
        looked.append(len(batch.groups))
        return plain(batch, *args, **more)

    monkeypatch.setattr(stage, "observe", counted)
    _, tracker, learner = learn(name, folder, tmp_path / "run", comparisons(), "fit.steps=2")
    role = learner.algorithm.reference.role
    assert ("reference" in [event for event, _ in tracker.events]) == (role == "frozen")
    assert ("logprobs_ref" in learner.data.batch.tokens) == (role == "frozen")
    assert (tmp_path / "run/checkpoints/last/reference").exists() == (role in ("synced", "ema"))
    per_step = {"frozen": 0, "none": 0, "synced": 1, "ema": 1}[role] + learner.algorithm.needs_mismatched  # its own pass is the update's
    once = (role == "frozen") * (1 + learner.algorithm.needs_mismatched)
    assert len(looked) == once + 2 * per_step


def test_the_table_of_losses_in_the_documentation_is_the_registry() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "stages.md").read_text()
    table = text.partition("| name | minimises")[2].partition("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == EVERY


def test_reference_free_losses_are_these(folder: Path) -> None:
    roles = {name: PREFERENCES[name].load().Config().reference.role for name in EVERY}
    assert {name for name, role in roles.items() if role == "none"} == {"orpo", "simpo", "cpo"}
    assert {name for name, role in roles.items() if role != "frozen"} - {"orpo", "simpo", "cpo"} == {"tr_dpo"}


def test_kto_baseline_is_the_kl_of_mismatched_pairs(folder: Path, tmp_path: Path) -> None:
    _, tracker, learner = learn("kto", folder, tmp_path / "run", labelled(), "fit.steps=4", "optim.lr=1e-2")
    assert tracker.metrics[0]["reward/baseline"] == 0  # the policy is the reference
    records = labelled()
    mixed = stage.mismatch([c.group for c in records], [c.group for c in records])
    assert all(m.prompt == c.group.prompt for m, c in zip(mixed, records, strict=True))
    answers = {
        c.group.prompt.tokens: {r.tokens for o in records if o.group.prompt == c.group.prompt for r in o.group.responses} for c in records
    }
    assert all(m.responses[0].tokens not in answers[m.prompt.tokens] or m.responses[0].text == "bad no" for m in mixed)
    batch = Batch(tuple(mixed))
    with torch.no_grad():
        h = batch.sum_by_response((learner.model.forward(batch).logprobs - loaded(folder).forward(batch).logprobs) * batch.mask)
    prepared = learner.prepare(learner.data.batch, 9)
    assert prepared.responses["kto_baseline"].tolist() == pytest.approx([max(0.0, float(h.mean()))] * len(records))


def test_bco_threshold_is_the_running_mean_and_its_state_is_restored(folder: Path, tmp_path: Path) -> None:
    _, tracker, learner = learn("bco", folder, tmp_path / "run", labelled(), "fit.steps=3", "optim.lr=1e-2")
    counts = [row["reward/baseline"] for row in tracker.metrics]
    rewards = []
    for row in tracker.metrics:
        good, bad = (sum(c.scores[0] == kind for c in labelled()) for kind in (1.0, 0.0))
        rewards.append((good * row["reward/desirable"] + bad * row["reward/undesirable"]) / (good + bad))
    assert counts == pytest.approx([sum(rewards[: i + 1]) / (i + 1) for i in range(3)])
    state = json.loads(json.dumps(learner.algorithm.state_dict()))
    fresh = PREFERENCES["bco"].load()(learner.config.algorithm, "bco")
    fresh.load_state_dict(state)
    after = [a.prepare(learner.data.batch.with_tokens(logprobs_now=learner._look(learner.data.batch))) for a in (fresh, learner.algorithm)]
    assert torch.equal(after[0].responses["bco_baseline"], after[1].responses["bco_baseline"])


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
def test_a_moving_reference_is_the_policy_of_some_steps_ago(lora: str, folder: Path) -> None:
    config = ModelConfig.model_validate({"path": str(folder), "dtype": "float64", "lora": json.loads(lora.replace("rank", '"rank"'))})
    model = LanguageModel.load(config, template="plain")
    batch, reference = Batch(tuple(c.group for c in comparisons())), MovingReference(model)
    with torch.no_grad():
        start = model.forward(batch).logprobs
        for p in model.trainable().values():
            p += 0.01 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1))
        moved = model.forward(batch).logprobs
    assert not torch.allclose(start, moved)
    assert torch.equal(reference.forward(batch).logprobs, start)
    assert torch.equal(model.forward(batch).logprobs, moved)  # the policy is as it was
    reference.move(decay=0.5)
    half = {name: w.clone() for name, w in reference.weights.items()}
    reference.move(decay=0.0)
    assert torch.equal(reference.forward(batch).logprobs, moved)
    assert furthest(half, reference.weights) > 0


def test_trust_region_moves_when_it_should(folder: Path, tmp_path: Path) -> None:
    common = ("fit.steps=5", "optim.lr=1e-2", "optim.schedule=constant")
    _, tracker, _ = learn("tr_dpo", folder, tmp_path / "run", comparisons(), *common)
    losses = [row["loss/tr_dpo"] for row in tracker.metrics]
    at_reference = [i for i, loss in enumerate(losses) if loss == pytest.approx(math.log(2), abs=1e-12)]
    assert at_reference == [0, 2, 4]
    ema = ("algorithm.reference={role: ema, decay: 0.5}", "algorithm.nll_weight=0", "algorithm.label_smoothing=0")
    _, followed, _ = learn("dpo", folder, tmp_path / "run", comparisons(), *common, *ema)
    _, frozen, _ = learn("dpo", folder, tmp_path / "run", comparisons(), *common, *ema[1:])
    margins = [(a["train/margin"], b["train/margin"]) for a, b in zip(followed.metrics, frozen.metrics, strict=True)]
    assert all(0 < a < b for a, b in margins[2:])  # a reference that follows leaves less of a margin


def test_losses_that_are_presets_equal_dpo_where_they_should(folder: Path, tmp_path: Path) -> None:
    records = [c for c in comparisons() if c.kind == "pair"]

    def weights(name: str, *overrides: str) -> dict[str, torch.Tensor]:
        plain = ["algorithm.nll_weight=0", "algorithm.label_smoothing=0"] if name == "dpo" else []
        return learn(name, folder, tmp_path / "run", records, "fit.steps=2", "optim.eps=1e-3", *plain, *overrides)[0]

    dpo = weights("dpo")
    assert furthest(dpo, weights("ld_dpo", "algorithm.tail_weight=1")) < 1e-9
    assert furthest(dpo, weights("f_dpo", "algorithm.divergence=reverse_kl")) < 1e-9
    assert furthest(dpo, weights("plackett_luce")) < 1e-9
    assert furthest(dpo, weights("tr_dpo", "algorithm.reference.every=100")) < 1e-9
    assert furthest(dpo, weights("mixture", "algorithm.members={dpo: 1}", "algorithm.settings={}")) < 1e-9
    assert furthest(weights("rpo"), weights("mixture", "algorithm.members={rpo: 1}")) < 1e-9
    for name in ("ld_dpo", "wpo", "dpo_mean", "rpo"):
        assert furthest(dpo, weights(name)) > 1e-6


def test_optimal_transport_has_the_gradient_of_the_whole_minibatch_in_every_micro_batch() -> None:
    records = [c for c in comparisons() if c.kind == "pair"]
    batch, generator = Batch(tuple(c.group for c in records)), torch.Generator().manual_seed(2)
    now, ref = (torch.randn(len(batch.mask), dtype=torch.float64, generator=generator) for _ in range(2))
    chosen = torch.tensor([s for c in records for s in c.scores], dtype=torch.float64)
    batch = batch.with_tokens(logprobs_now=now, logprobs_ref=ref).with_responses(judgement=chosen, desirable=chosen)
    leaf = now.clone().requires_grad_()
    policy, reference = (batch.sum_by_response(x * batch.mask) for x in (leaf, ref))
    h, good, bad = policy - reference, chosen == 1, chosen == 0
    margins = ((policy[good] - policy[bad]).sort().values, (reference[good] - reference[bad]).sort().values)
    whole = {"aot": margins, "aot_unpaired": (h[good].sort().values, h[bad].sort().values)}
    for name, (upper, lower) in whole.items():
        value = -torch.nn.functional.logsigmoid(0.1 * (upper - lower)).mean()
        (expected,) = torch.autograd.grad(value, leaf, retain_graph=True)
        kind = PREFERENCES[name].load()
        algorithm = kind(kind.Config(), name)
        prepared, counts = algorithm.prepare(batch), Counts.of(batch)
        found = []
        for micro in prepared.micro_batches(1):
            part = micro.tokens["logprobs_now"].clone().requires_grad_()
            loss = algorithm.loss(Outputs(part), micro, counts)
            loss.value.backward()
            found.append((loss.value.detach(), part.grad))
        assert float(torch.stack([v for v, _ in found]).sum()) == pytest.approx(value.item())
        assert torch.allclose(torch.cat([g for _, g in found]), expected, atol=1e-12)


def test_a_mixture_is_the_weighted_sum_and_reports_its_first_loss(folder: Path, tmp_path: Path) -> None:
    members = "algorithm.members={nll: 0.5, ipo: 2, kto: 1}"
    _, tracker, _ = learn(
        "mixture", folder, tmp_path / "run", comparisons(), "fit.steps=2", members, "algorithm.settings={ipo: {tau: 0.3}}"
    )
    row = tracker.metrics[-1]
    assert row["loss/mixture"] == pytest.approx(0.5 * row["loss/nll"] + 2 * row["loss/ipo"] + row["loss/kto"])
    assert {"train/accuracy", "reward/chosen", "reward/rejected"} < row.keys()
    assert not {"reward/desirable", "reward/baseline"} & row.keys()
    _, alone, _ = learn("ipo", folder, tmp_path / "run", comparisons(), "fit.steps=2", "algorithm.tau=0.3")
    assert tracker.metrics[0]["loss/ipo"] == pytest.approx(alone.metrics[0]["loss/ipo"])


def test_length_desensitised_counts_the_tail_less(folder: Path) -> None:
    kind = PREFERENCES["ld_dpo"].load()
    algorithm = kind(kind.Config(tail_weight=0.25), "ld_dpo")
    responses = (Response((5,) * 6, "", mask=(True, False, True, True, True, True)), Response((6,) * 2, ""), Response((7,) * 4, ""))
    batch = Batch((Group(Prompt((1,), ""), responses),)).with_responses(judgement=torch.tensor([2.0, 1.0, 0.0]))
    now = torch.arange(1.0, 13.0, dtype=torch.float64)
    batch = batch.with_tokens(logprobs_ref=torch.zeros(12, dtype=torch.float64))
    chosen, rejected = algorithm.pair_log_ratios(now, batch)
    # pairs (0, 1): 2 own tokens public; (0, 2): 4; (1, 2): 2
    assert chosen.tolist() == [1 + 3 + (4 + 5 + 6) / 4, 1 + 3 + 4 + 5 + 6 / 4, 7 + 8]
    assert rejected.tolist() == [7 + 8, 9 + 10 + 11 + 12, 9 + 10 + (11 + 12) / 4]


def test_labels_come_from_every_kind_of_judgement() -> None:
    group = Group(Prompt((1,), ""), tuple(Response((i,), "") for i in range(2, 5)))
    assert desirability(Comparison(group, (2.0, 1.0, 0.0), "ranking"), 9.0) == [1, 0.5, 0]
    assert desirability(Comparison(group, (2.0, 1.0, 1.0), "ranking"), 9.0) == [1, 0, 0]
    assert desirability(Comparison(group, (5.0, 3.0, 1.0), "rating"), 3.0) == [1, 0.5, 0]
    assert desirability(Comparison(group, (1.0, 1.0, 0.0), "binary"), 9.0) == [1, 1, 0]
    assert desirability(Comparison(group.only([0, 1]), (1.0, 0.0)), 9.0) == [1, 0]
    assert [desirability(Comparison(group.only([0]), (score,), "process"), 9.0) for score in (1.0, 0.0)] == [[1], [0]]


def test_responses_without_opinion_do_not_count_as_labels(folder: Path, tmp_path: Path) -> None:
    records = [c for c in comparisons() if c.kind == "ranking"][:1] + labelled()[:4]
    assert 0.5 in desirability(records[0], 0.0)
    more = [replace(records[0], group=records[0].group.only([0, 2]), scores=(1.0, 0.0), kind="pair"), *records[1:]]
    values = []
    for data in (records, more):
        _, tracker, _ = learn("bco", folder, tmp_path / "run", data, "fit.steps=1")
        values.append({k: v for k, v in tracker.metrics[0].items() if k[:4] in ("loss", "rewa", "trai", "logp")})
    assert values[0] == pytest.approx(values[1])


def test_unsure_choices_are_smoothed_labels(folder: Path, tmp_path: Path) -> None:
    pairs = [c for c in comparisons() if c.kind == "pair"]
    unsure = [replace(c, probability=0.7) for c in pairs]
    settings = ("fit.steps=2", "optim.eps=1e-3", "algorithm.nll_weight=0")
    soft, _, _ = learn("dpo", folder, tmp_path / "run", unsure, *settings, "algorithm.label_smoothing=0")
    smooth, _, _ = learn("dpo", folder, tmp_path / "run", pairs, *settings, "algorithm.label_smoothing=0.3")
    sure, _, _ = learn("dpo", folder, tmp_path / "run", pairs, *settings, "algorithm.label_smoothing=0")
    assert furthest(soft, smooth) < 1e-12
    assert furthest(soft, sure) > 1e-6


def test_comparisons_without_a_winner_are_left_out_and_told(folder: Path, tmp_path: Path) -> None:
    records = comparisons()
    tie = replace(records[0], scores=(1.0, 1.0, 1.0))
    _, tracker, learner = learn("dpo", folder, tmp_path / "run", [*records, tie], "fit.steps=1")
    assert ("left out", 1) in [(kind, details.get("comparisons")) for kind, details in tracker.events]
    assert len(learner.data.batch.groups) == len(records)


def test_losses_on_pairs_refuse_labels(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="learns from pairs"):
        learn("ipo", folder, tmp_path / "run", labelled())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model", scale=1.0)
    words = [*WORDS, "paper", "light", "green", "seven"]
    rows = [{"prompt": f"{w}?", "chosen": f"good {w}", "rejected": f"bad {v}"} for w in words for v in words[:4]]
    random.Random(0).shuffle(rows)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def from_file(place: Path, *overrides: str) -> Any:
    settings = [f"model.path={place / 'model'}", "model.dtype=float32", f"data.path={place / 'pairs.jsonl'}", "fit.batch_size=8"]
    return load_recipe(preference_config("dpo"), None, [*settings, "optim.lr=3e-3", f"output={place / 'run'}", *overrides])


def test_dpo_starts_at_log_two_and_learns_the_preference(place: Path) -> None:
    tracker = tiny.Recorder()
    metrics = preference("dpo", from_file(place, "fit.steps=30", "data.holdout=0.2"), place / "run", tracker)
    assert tracker.metrics[0]["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert tracker.metrics[0]["train/margin"] == 0
    assert metrics["eval/accuracy"] == 1.0
    assert metrics["reward/chosen"] > metrics["reward/rejected"]


def test_dpo_evaluates_the_loss_that_the_saved_models_have_in_plain_transformers(place: Path) -> None:
    config = from_file(place, "fit.steps=5", "optim.lr=1e-3", "data.holdout=0.3", "algorithm.beta=0.2")
    metrics = preference("dpo", config, place / "run", tiny.Recorder())
    folders = (place / "run/checkpoints/last/model", place / "model")
    trained, start = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders)
    losses = []
    with torch.no_grad():
        for comparison in load_comparisons(config.data, LanguageModel.load(config.model).template).holdout:
            prompt = comparison.group.prompt.tokens
            chosen, rejected = (
                plain_logprobs(trained, prompt, r.tokens).sum() - plain_logprobs(start, prompt, r.tokens).sum()
                for r in comparison.group.responses
            )
            losses.append(-torch.nn.functional.logsigmoid(0.2 * (chosen - rejected)))
    assert metrics["eval/loss"] == pytest.approx(float(torch.stack(losses).mean()), abs=1e-5)
    assert metrics["eval/loss"] < math.log(2)
