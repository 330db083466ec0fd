"""Every loss recovers a planted reward, however a minibatch is cut; ensembles, normalisation, and what is saved."""

from __future__ import annotations

import json
import random
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import bag
import tiny
from trimtab.algorithms.reward import READS, Kind, RewardLossConfig, reward_loss
from trimtab.batch import Batch, Counts, Outputs, observe
from trimtab.config import load_recipe
from trimtab.errors import ConfigError, DataError
from trimtab.maths.reward_losses import list_sum
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.stages.reward import RewardModelConfig, bootstrap_weights, check_fit, held_out_metrics, reward, reward_batch
from trimtab.training.optimiser import OptimConfig, Optimiser
from trimtab.training.update import update
from trimtab.types import Comparison, Group, Step

KINDS = get_args(Kind)
WORTH = {"a": 1.0, "b": 0.6, "c": 0.2, "d": -0.5, "e": -1.2}
TEMPLATE = bag.scorer().template
PROMPT = TEMPLATE.prompt("q:")


def worth(text: str) -> float:
    return sum(WORTH[letter] for letter in text)


def text(draw: random.Random, length: int = 8) -> str:
    return "".join(draw.choice("abcde") for _ in range(length))


def group(*texts: str) -> Group:
    return Group(PROMPT, tuple(TEMPLATE.response(PROMPT, t) for t in texts))


def judged(kind: str, draw: random.Random, size: int = 3) -> Comparison:
    """One judgement by the planted reward."""
    if kind == "pointwise":
        answer = text(draw)
        return Comparison(group(answer), (worth(answer),), "rating")
    if kind == "outcome":
        answer = text(draw)
        return Comparison(group(answer), (float(worth(answer) > 0),), "binary")
    if kind == "process":
        steps = [text(draw, draw.randint(1, 4)) for _ in range(4)]
        values = [worth("".join(steps[: k + 1])) for k in range(4)]
        labels = [None if draw.random() < 0.2 else float(value > 0) for value in values]
        ends = list(accumulate(map(len, steps)))
        marked = tuple(Step(s, e - 1, label) for s, e, label in zip(steps, ends, labels, strict=True))
        return Comparison(group("".join(steps)), (float(0 not in labels),), "process", steps=marked)
    answers = [text(draw) for _ in range(size)]
    return Comparison(group(*answers), tuple(float(sum(worth(a) > worth(b) for b in answers)) for a in answers), "ranking")


def data(kind: str, n: int, seed: int = 0) -> list[Comparison]:
    draw = random.Random(seed)
    made = [judged(kind, draw) for _ in range(n)]
    return [c for c in made if kind != "plackett-luce" or len(set(c.scores)) == len(c.scores)]


def forward(scorer: Scorer, kind: str) -> Any:
    return scorer.scores if READS[kind] == "response" else scorer.token_scores  # type: ignore[index]


def ranks(x: torch.Tensor) -> torch.Tensor:
    return x.argsort().argsort().double()


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_recovers_a_planted_reward(kind: Kind) -> None:
    scorer = bag.scorer()
    batch = reward_batch(data(kind, 80), kind)
    loss, optimiser = reward_loss(RewardLossConfig(kind=kind)), Optimiser(scorer.trainable(), OptimConfig(lr=0.2, max_grad_norm=1e9), 60)
    for step in range(60):
        update(batch, forward(scorer, kind), loss, [optimiser], at=step, token_budget=10**6)
    draw = random.Random(99)
    fresh = [text(draw) for _ in range(200)]
    scores = observe(Batch((group(*fresh),)), scorer.scores, token_budget=10**6).scores
    truth = torch.tensor([worth(t) for t in fresh], dtype=torch.float64)
    tied_alike = truth + 1e-6 * scores  # ties of the truth are in no order
    assert torch.corrcoef(torch.stack([ranks(scores), ranks(tied_alike)]))[0, 1] > 0.98
    held_out = held_out_metrics(scorer, reward_batch(data(kind, 60, seed=1), kind), kind, 10**6)
    assert held_out["eval/squared_error"] < 1e-2 if kind == "pointwise" else held_out["eval/accuracy"] > 0.9


@pytest.mark.parametrize(
    ("kind", "heads"), [(kind, heads) for kind in KINDS for heads in (1, 3) if heads == 1 or READS[kind] == "response"]
)
def test_micro_batches_change_nothing(kind: Kind, heads: int) -> None:
    weights, metrics = [], []
    for budget in (10**6, 40):
        scorer = bag.scorer(heads)
        torch.manual_seed(0)
        torch.nn.init.normal_(scorer.head.weight, std=0.1)
        batch = reward_batch(data(kind, 12), kind)
        batch = batch.with_responses(**bootstrap_weights(batch, heads, seed=3)) if heads > 1 else batch
        optimiser = Optimiser(scorer.trainable(), OptimConfig(lr=0.1, max_grad_norm=1e9), 10)
        for step in range(3):
            out = update(batch, forward(scorer, kind), reward_loss(RewardLossConfig(kind=kind)), [optimiser], at=step, token_budget=budget)
        weights.append(scorer.head.weight.detach().clone())
        metrics.append(out)
    assert torch.allclose(weights[0], weights[1], rtol=0, atol=1e-9)
    assert metrics[0] == pytest.approx(metrics[1], abs=1e-9)


def value(scorer: Scorer, comparisons: list[Comparison], **settings: Any) -> float:
    config = RewardLossConfig(**{"centring": 0.0, **settings})
    batch = reward_batch(comparisons, config.kind)
    return float(reward_loss(config)(forward(scorer, config.kind)(batch), batch, Counts.of(batch)).value.detach())


def planted() -> Scorer:
    scorer = bag.scorer()
    for letter, w in WORTH.items():
        scorer.head.weight.data[0, TEMPLATE.tokenizer.encode(letter)[0]] = w
    return scorer


def test_all_pairs_of_a_prompt_are_one_group() -> None:
    rankings = data("plackett-luce", 10)
    wanted = []
    for c in rankings:
        order = sorted(range(3), key=lambda i: -c.scores[i])
        wanted.append(list_sum(torch.tensor([worth(c.group.responses[i].text) for i in order])).mean())
    assert value(planted(), rankings) == pytest.approx(float(torch.stack(wanted).mean()), abs=1e-6)


def test_margins_soft_labels_and_smoothing_reach_the_loss() -> None:
    import math

    def bce(logit: float, label: float) -> float:
        return math.log1p(math.exp(-logit)) * label + math.log1p(math.exp(logit)) * (1 - label)

    plain = Comparison(group("a", "c"), (1.0, 0.0))
    unsure = Comparison(group("a", "c"), (1.0, 0.0), margin=0.3, probability=0.7)
    assert value(planted(), [plain]) == pytest.approx(bce(0.8, 1), abs=1e-9)
    assert value(planted(), [unsure], margin=0.1) == pytest.approx(bce(0.4, 0.7), abs=1e-9)
    assert value(planted(), [plain], label_smoothing=0.2) == pytest.approx(bce(0.8, 0.8), abs=1e-9)
    assert value(planted(), [unsure], kind="hinge") == pytest.approx(0.5, abs=1e-9)
    assert value(planted(), [unsure], kind="hinge", margin=0.4) == 0
    assert value(planted(), [plain], centring=0.5) == pytest.approx(bce(0.8, 1) + 0.5 * 1.2**2, abs=1e-9)


def test_neutral_steps_and_the_insides_of_steps_teach_nothing() -> None:
    steps = (Step("ab", 1, 1.0), Step("cde", 4, None), Step("a", 5, 0.0))
    one = Comparison(group("abcdea"), (0.0,), "process", steps=steps)
    batch, scorer = reward_batch([one], "process"), planted()
    assert batch.tokens["judged"].tolist() == [False, True, False, False, False, True, False]
    outputs, loss = scorer.token_scores(batch), reward_loss(RewardLossConfig(kind="process"))
    clean = loss(outputs, batch, Counts.of(batch)).value
    assert outputs.token_scores is not None
    hidden = ~batch.tokens["judged"]
    spoilt = Outputs(token_scores=torch.where(hidden, 77.0, outputs.token_scores))
    labels = torch.where(hidden, torch.nan, batch.tokens["label"])
    assert torch.equal(loss(spoilt, batch.with_tokens(label=labels), Counts.of(batch)).value, clean)


def test_token_scores_are_read_after_every_token(tmp_path: Path) -> None:
    tiny.folder(tmp_path / "base")
    scorer = Scorer.load(ModelConfig(path=str(tmp_path / "base"), dtype="float64"), head="normal")
    tokens = Group(PROMPT, tuple(TEMPLATE.response(PROMPT, t) for t in ("abc", "d")))
    batch = Batch((tokens, group("edcba", "aa")))
    after, ends = scorer.token_scores(batch).token_scores, scorer.scores(batch).scores
    before = scorer.values(batch).values
    assert torch.allclose(after[batch.last_token], ends, atol=1e-12)
    inner = torch.ones(len(after), dtype=torch.bool)
    inner[batch.last_token] = False
    assert torch.allclose(after[inner], before[1:][inner[:-1]], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "comparison", "match"),
    [
        ("process", judged("outcome", random.Random(0)), "needs steps and labels; this row is of the kind binary"),
        ("pointwise", Comparison(group("a", "b"), (1.0, 0.0)), "needs ratings"),
        ("plackett-luce", Comparison(group("a", "b", "c"), (1.0, 0.0, 0.0), "ranking"), "a ranking with ties"),
        ("bradley-terry", judged("pointwise", random.Random(0)), "no row has two responses"),
    ],
)
def test_judgements_that_do_not_fit_the_loss_are_refused(kind: Kind, comparison: Comparison, match: str) -> None:
    with pytest.raises(DataError, match=match):
        check_fit([comparison], kind)


# the whole stage, on a tiny model


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "model", scale=1.0)
    draw = random.Random(0)
    words = ["apple", "river", "stone", "cloud", "table", "horse", "paper", "light", "green", "seven"]
    write(tmp_path / "pairs.jsonl", [{"prompt": f"{w}?", "chosen": f"good {w}", "rejected": f"bad {v}"} for w in words for v in words[:4]])
    write(tmp_path / "samples.jsonl", [{"prompt": f"{w}?", "responses": [text(draw), f"good {w}", f"bad {w}"]} for w in words])
    write(tmp_path / "steps.jsonl", [{"prompt": f"{w}?", "steps": ["good", "so", bad], "labels": [1, None, int(bad == "good")]}
                                     for w in words for bad in ("bad", "good")])  # fmt: skip
    write(tmp_path / "labels.jsonl", [{"prompt": f"{w}?", "completion": a, "label": a == "good"} for w in words for a in ("good", "bad")])
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(place: Path, *overrides: str) -> tuple[dict[str, float], Path]:
    settings = [f"model.path={place / 'model'}", "model.dtype=float32", "fit.batch_size=8", "fit.steps=25", "optim.lr=3e-3"]
    config = load_recipe(RewardModelConfig, None, [*settings, f"output={place / 'run'}", *overrides])
    return reward(config, place / "run", tiny.Recorder()), place / "run/checkpoints/last/model"


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
def test_an_ensemble_is_several_heads_on_one_trunk(place: Path, lora: str) -> None:
    metrics, folder = run(place, f"data.path={place / 'pairs.jsonl'}", "ensemble.members=3", "data.holdout=0.3", f"model.lora={lora}")
    assert metrics["eval/accuracy"] > 0.9
    assert 0 <= metrics["eval/disagreement"] <= 1
    again = Scorer.load(ModelConfig(path=str(folder), dtype="float32"), head="saved", trainable=False)
    outputs = again.scores(Batch((group("good", "bad", "abc"),)))
    assert outputs.members.shape == (3, 3)
    assert torch.equal(outputs.members.mean(1), outputs.scores)
    assert (outputs.members.std(1) > 0).all()
    again.save(place / "whole")  # loading merges an adapter
    assert AutoModelForSequenceClassification.from_pretrained(place / "whole").score.weight.shape == (3, 32)
    with pytest.raises(ConfigError, match="has 3 heads, not 1"):
        run(place, f"data.path={place / 'pairs.jsonl'}", f"model.path={folder}", "head=saved")


def test_heads_start_apart_and_see_their_own_prompts() -> None:
    batch = reward_batch(data("bradley-terry", 20), "bradley-terry")
    named = Batch(tuple(Group(TEMPLATE.prompt(f"q{i}:"), g.responses) for i, g in enumerate(batch.groups)), {}, batch.responses)
    weights = bootstrap_weights(named, 2, seed=0)
    assert not torch.equal(weights["weight_0"], weights["weight_1"])
    order = list(range(19, -1, -1))
    turned = bootstrap_weights(named.select(order), 2, seed=0)
    assert torch.equal(named.with_responses(**weights).select(order).responses["weight_1"], turned["weight_1"])
    many = Batch(tuple(Group(TEMPLATE.prompt(f"p{i}"), group("a").responses) for i in range(2000)))
    drawn = bootstrap_weights(many, 1, seed=0)["weight_0"]
    assert float(drawn.mean()) == pytest.approx(1, abs=0.1)
    assert float(drawn.var()) == pytest.approx(1, abs=0.15)


def test_an_ensemble_reads_its_trunk_once() -> None:
    scorer = bag.scorer(4)
    scorer.scores(Batch((group("a", "b"),)))
    assert scorer.model.passes == 1


@pytest.mark.parametrize("members", [1, 2])
def test_normalised_scores_have_mean_0_and_deviation_1_and_transformers_sees_the_raw_ones(place: Path, members: int) -> None:
    common = (f"data.path={place / 'pairs.jsonl'}", f"ensemble.members={members}", "head=normal")
    run(place, *common)
    raw = Scorer.load(ModelConfig(path=str(place / "run"), dtype="float32"), head="saved", trainable=False)
    _, folder = run(place, *common, f"normalise.path={place / 'samples.jsonl'}")
    scorer = Scorer.load(ModelConfig(path=str(folder), dtype="float32"), head="saved", trainable=False)
    template = scorer.template
    rows = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    prompts = [template.prompt(row["prompt"]) for row in rows]
    reference = Batch(
        tuple(Group(p, tuple(template.response(p, r) for r in row["responses"])) for p, row in zip(prompts, rows, strict=True))
    )
    scores = scorer.scores(reference).members.double()
    assert scores.mean(0).tolist() == pytest.approx([0] * members, abs=1e-4)
    assert scores.std(0, correction=0).tolist() == pytest.approx([1] * members, abs=1e-4)
    assert torch.equal(raw.head.weight, scorer.head.weight)  # only the note differs: transformers gives raw scores
    expected = raw.scores(reference).members * torch.tensor(scorer.note.gain) + torch.tensor(scorer.note.bias)
    assert torch.allclose(scores.float(), expected, atol=1e-5)


@pytest.mark.parametrize(("kind", "reads", "judged_at_end"), [("process", "step", 4), ("outcome", "token", 4)])
def test_steps_and_outcomes_are_learnt_by_a_real_model(place: Path, kind: str, reads: str, judged_at_end: int) -> None:
    rows = place / ("steps.jsonl" if kind == "process" else "labels.jsonl")
    metrics, folder = run(place, f"data.path={rows}", f"loss.kind={kind}", "data.step_separator=' '", "data.holdout=0.35", "fit.steps=60")
    assert metrics["eval/accuracy"] == 1.0
    assert metrics["eval/judged"] >= judged_at_end
    scorer = Scorer.load(ModelConfig(path=str(folder), dtype="float32"), head="saved", trainable=False)
    assert scorer.note.reads == reads


@pytest.mark.parametrize(
    "setting",
    ["loss={kind: process}, ensemble={members: 2}", "ensemble={members: 2}, head=zero", "loss={kind: hinge, label_smoothing: 0.1}"],
)
def test_settings_that_contradict_each_other_are_refused(setting: str) -> None:
    overrides = [part.strip() for part in setting.replace("}, ", "}|").split("|")]
    with pytest.raises(ConfigError):
        load_recipe(RewardModelConfig, None, ["data.path=x.jsonl", *overrides])
