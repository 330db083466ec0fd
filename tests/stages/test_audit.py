"""The audit finds what was planted: accuracy by slice, a length bias of the judges, flipped labels, models that disagree."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

import bag
import tiny
from trimtab.batch import Batch, observe
from trimtab.cli import main
from trimtab.errors import ConfigError, DataError
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.stages.audit import AuditConfig, Evidence, audit, disagreement, findings, gather
from trimtab.types import Comparison, Group

TEMPLATE = bag.scorer().template
PROMPT = TEMPLATE.prompt("q:", {"source": "web"})
OTHER = TEMPLATE.prompt("q:", {"source": "book"})


def answer(draw: random.Random) -> str:
    return "".join(draw.choice("abx") for _ in range(draw.randint(2, 16)))


def truth(text: str) -> float:
    return 0.8 * (text.count("a") - text.count("b"))


def planted(n: int, per_token: float = 0.0, noise: float = 0.0, seed: int = 0) -> Evidence:
    """Judges who look at the true reward and at length, and slip; scored by the true reward."""
    draw = random.Random(seed)
    comparisons, scores = [], []
    for i in range(n):
        texts = [answer(draw), answer(draw)]
        logit = truth(texts[0]) - truth(texts[1]) + per_token * (len(texts[0]) - len(texts[1]))
        first = (draw.random() < 1 / (1 + np.exp(-logit))) ^ (draw.random() < noise)
        texts = texts if first else texts[::-1]
        prompt = OTHER if i % 2 else PROMPT
        comparisons.append(Comparison(Group(prompt, tuple(TEMPLATE.response(prompt, t) for t in texts)), (1.0, 0.0), margin=i % 3))
        scores.append([truth(t) for t in texts])
    return gather(comparisons, scores)


def test_a_planted_length_bias_is_inside_its_interval() -> None:
    biased, fair = findings(planted(1500, per_token=0.25))["length"], findings(planted(1500))["length"]
    assert biased["per_token"]["low"] < 0.25 < biased["per_token"]["high"]
    assert biased["per_token"]["low"] > 0.15
    assert biased["judgement"]["low"] > 0.2
    assert fair["per_token"]["low"] < 0 < fair["per_token"]["high"]
    assert fair["judgement"]["low"] < 0 < fair["judgement"]["high"]
    for found in (biased, fair):
        assert found["per_point"]["low"] < 1 < found["per_point"]["high"]
        assert abs(found["score"]["estimate"]) < 0.1  # the true reward does not look at length


def test_planted_label_noise_is_inside_its_interval() -> None:
    noisy, clean = findings(planted(2000, noise=0.2))["noise"], findings(planted(2000))["noise"]
    assert noisy["low"] < 0.2 < noisy["high"]
    assert noisy["high"] - noisy["low"] < 0.15
    assert clean["low"] == 0.0
    assert clean["high"] < 0.05


def test_a_true_model_is_calibrated_and_an_overconfident_one_is_not() -> None:
    evidence = planted(3000)
    assert findings(evidence)["calibration"]["error"] < 0.03
    sure = Evidence(True, evidence.scores * 5, evidence.lengths, evidence.labels, evidence.sizes, evidence.margins, evidence.rows)
    assert findings(sure)["calibration"]["error"] > 0.08


def test_slices_add_up_to_the_whole() -> None:
    evidence = planted(300)
    found = findings(evidence, ["source"])
    assert set(found["slices"]) == {"source", "length", "longer", "margin", "score margin"}
    assert set(found["slices"]["source"]) == {"web", "book"}
    for values in found["slices"].values():
        assert sum(v["n"] for v in values.values()) == 300
        right = sum(v["n"] * v["estimate"] for v in values.values())
        assert right == pytest.approx(300 * found["accuracy"]["estimate"])
        assert all(v["low"] <= v["estimate"] <= v["high"] for v in values.values())
    sure = list(found["slices"]["score margin"].values())
    assert sure[-1]["estimate"] > sure[0]["estimate"]


def test_what_the_data_do_not_allow_is_null() -> None:
    one = Comparison(Group(PROMPT, tuple(TEMPLATE.response(PROMPT, t) for t in ("a", "b"))), (1.0, 0.0))
    found = findings(gather([one], [[1.0, -1.0]]))
    assert found["accuracy"]["estimate"] == 1.0
    assert found["noise"] is None
    assert found["length"] == {"score": None, "judgement": None, "per_point": None, "per_token": None}
    with pytest.raises(DataError, match="neither a pair nor a label"):
        gather([Comparison(one.group, (1.0, 1.0))], [[1.0, 2.0]])


def test_single_labels_are_audited_too() -> None:
    draw = random.Random(0)
    texts = [answer(draw) for _ in range(800)]
    labels = [float(draw.random() < 1 / (1 + np.exp(-truth(t) - 0.2 * (len(t) - 9)))) for t in texts]
    comparisons = [Comparison(Group(PROMPT, (TEMPLATE.response(PROMPT, t),)), (y,), "binary") for t, y in zip(texts, labels, strict=True)]
    found = findings(gather(comparisons, [[truth(t)] for t in texts]))
    assert found["length"]["per_token"]["low"] < 0.2 < found["length"]["per_token"]["high"]
    assert found["length"]["judgement"]["low"] > 0.1


def test_models_disagree_as_often_as_their_orders_differ() -> None:
    one = planted(400)
    scores = np.where(np.arange(400) < 100, -one.scores, one.scores)
    other = Evidence(True, scores, one.lengths, one.labels, one.sizes, one.margins, one.rows)
    found = disagreement(one, other)
    assert found["disagree"]["estimate"] == float((one.scores[:100] != 0).sum()) / 400
    assert found["correlation"]["low"] < float(np.corrcoef(one.scores, scores)[0, 1]) < found["correlation"]["high"]
    assert disagreement(one, one)["disagree"]["estimate"] == 0
    assert disagreement(one, one)["correlation"]["estimate"] == pytest.approx(1.0)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny.folder(tmp_path / "base")
    for name, seed in (("one", 1.0), ("two", -1.0)):
        scorer = Scorer.load(ModelConfig(path=str(tmp_path / "base"), dtype="float32"), head="normal")
        scorer.head.weight.data *= seed
        scorer.save(tmp_path / name)
    rows = [
        {"prompt": f"p{i}", "chosen": "abc"[: i % 3 + 1], "rejected": "xyz"[: (i + 1) % 3 + 1], "source": "ab"[i % 2]} for i in range(20)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_command_prints_and_writes_what_the_models_say(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"model={place / 'one'}", f"others=[{place / 'two'}]", f"data.path={place / 'pairs.jsonl'}", f"output={place / 'audit'}"]
    assert main(["audit", *settings, "slices=[source]", "dtype=float32"]) == 0
    found = json.loads((place / "audit" / "audit.json").read_text())
    assert "share of flipped labels" in capsys.readouterr().out
    assert found["n"] == 20
    assert found["others"][str(place / "two")]["disagree"]["estimate"] == 1.0  # the second head is minus the first
    assert found["others"][str(place / "two")]["correlation"]["estimate"] == pytest.approx(-1.0, abs=1e-6)
    scorer = Scorer.load(ModelConfig(path=str(place / "one"), dtype="float32"), head="saved")
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    prompts = [scorer.template.prompt(row["prompt"]) for row in rows]
    groups = tuple(
        Group(p, tuple(scorer.template.response(p, row[k]) for k in ("chosen", "rejected"))) for p, row in zip(prompts, rows, strict=True)
    )
    r = observe(Batch(groups), scorer.scores, token_budget=10**6).scores.view(-1, 2)
    assert found["accuracy"]["estimate"] == pytest.approx(float((r[:, 0] > r[:, 1]).double().mean()))


def test_a_judge_of_steps_cannot_be_audited_as_one_of_responses(place: Path) -> None:
    scorer = Scorer.load(ModelConfig(path=str(place / "base"), dtype="float32"), head="normal")
    scorer.note = scorer.note.model_copy(update={"reads": "step"})
    scorer.save(place / "steps")
    with pytest.raises(ConfigError, match="judges steps"):
        audit(AuditConfig(model=str(place / "steps"), data={"path": str(place / "pairs.jsonl")}, output=str(place / "audit")))
