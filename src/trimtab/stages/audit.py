"""What a reward model has learnt, and what its data teach: where it is right, how sure it is, and whether length decides.

Works on pairs (chosen and rejected, rankings, ratings) or, where no row has two responses, on single labelled responses. All
pairs of a ranking are counted as if they were independent, so intervals of rankings are somewhat too narrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from trimtab.config import Config
from trimtab.data.records import DataConfig, load_comparisons
from trimtab.errors import DataError
from trimtab.maths.audit import correlation, label_noise, logistic_regression
from trimtab.maths.reward_losses import calibration
from trimtab.maths.statistics import Interval, wilson_interval
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.rewards.model import ModelReward
from trimtab.types import Comparison, Group


class AuditConfig(Config):
    """A recipe of `trimtab audit`."""

    output: str = Field("runs/audit", description="the folder that gets audit.json")
    model: str = Field(description="the reward model: its folder or run directory")
    others: list[str] = Field(default_factory=list, description="other reward models (of other seeds, say) to compare it with")
    data: DataConfig = Field(description="judgements; with data.holdout only the held-out prompts are used")
    slices: list[str] = Field(default_factory=list, description="columns of the rows by whose values accuracy is shown")
    buckets: int = Field(4, gt=0, le=9, description="parts of equal size by length and by margin")
    bins: int = Field(10, gt=0, description="bins of the calibration error")
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field("auto", description="precision of the reward models")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    tokens_per_batch: int = Field(8192, gt=0, description="packed tokens a reward model reads at once")


@dataclass(frozen=True)
class Evidence:
    """Judgements beside scores. For pairs every number is "preferred minus the other" and every label is 1.

    scores, lengths, labels: one entry per judgement; sizes: (mean) response length; margins: the annotator's; rows: the data.
    """

    paired: bool
    scores: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    sizes: np.ndarray
    margins: np.ndarray
    rows: Sequence[Mapping[str, Any]]

    @property
    def right(self) -> np.ndarray:
        """Whether each judgement was predicted: the preferred one scores higher; the score's sign is the label's."""
        found: np.ndarray = (self.scores > 0) == (self.labels > 0.5)
        return found

    def mirrored(self, column: np.ndarray) -> np.ndarray:
        """A column of pairs as seen from both responses (which of them is named first means nothing)."""
        return np.concatenate([column, -column]) if self.paired else column

    @property
    def seen_labels(self) -> np.ndarray:
        return np.concatenate([np.ones_like(self.labels), np.zeros_like(self.labels)]) if self.paired else self.labels


def gather(comparisons: Sequence[Comparison], scores: Sequence[Sequence[float]]) -> Evidence:
    """Judgements beside the scores of their responses. Raises DataError where there is neither a pair nor a label."""
    table: list[tuple[float, float, float, float, float, Mapping[str, Any]]] = []
    paired = any(c.pairs() for c in comparisons)
    for c, r in zip(comparisons, scores, strict=True):
        length, row = [len(response.tokens) for response in c.group.responses], c.group.prompt.row
        if paired:
            table += [(r[i] - r[j], length[i] - length[j], 1.0, (length[i] + length[j]) / 2, c.margin, row) for i, j in c.pairs()]
        elif c.kind in ("binary", "process"):
            table += [(r[i], length[i], c.scores[i], length[i], 0.0, row) for i in range(len(r))]
    if not table:
        raise DataError("there is neither a pair nor a label to audit", where="data", fix="give comparisons, or labelled responses")
    *numbers, rows = zip(*table, strict=True)
    columns = np.array(numbers, dtype=np.float64)
    return Evidence(paired, columns[0], columns[1], columns[2], columns[3], columns[4], rows)


def audit(config: AuditConfig) -> dict[str, Any]:
    """Audit a reward model; writes OUTPUT/audit.json and returns what it holds."""
    reward = _load(config, config.model)
    loaded = load_comparisons(config.data, reward.scorer.template)
    comparisons = loaded.holdout or loaded.records
    groups = [c.group for c in comparisons]
    evidence = gather(comparisons, _scores(reward, groups))
    others = {path: gather(comparisons, _scores(_load(config, path), groups)) for path in config.others}
    result = {
        "model": config.model,
        "judgements": "pairs" if evidence.paired else "labels",
        "n": len(evidence.scores),
        **findings(evidence, config.slices, config.buckets, config.bins),
        "others": {path: disagreement(evidence, other) for path, other in others.items()},
    }
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _load(config: AuditConfig, path: str) -> ModelReward:
    model = ModelConfig(path=path, dtype=config.dtype, device=config.device)
    scorer = Scorer.load(model, head="saved", trainable=False)
    return ModelReward(scorer, name=path, token_budget=config.tokens_per_batch, policy=scorer.template)


def _scores(reward: ModelReward, groups: list[Group]) -> list[list[float]]:
    return [[score.total for score in row] for row in reward.score(groups)]


def findings(evidence: Evidence, slices: Sequence[str] = (), buckets: int = 4, bins: int = 10) -> dict[str, Any]:
    """Everything that can be said of one model; what the data do not allow is null."""
    predicted = calibration(
        torch.sigmoid(torch.from_numpy(evidence.mirrored(evidence.scores))), torch.from_numpy(evidence.seen_labels), bins
    )
    return {
        "accuracy": proportion(evidence.right),
        "slices": accuracy_by_slice(evidence, slices, buckets),
        "calibration": predicted._asdict(),
        "length": length_bias(evidence),
        "noise": noise(evidence),
    }


def proportion(hits: np.ndarray) -> dict[str, float]:
    """A share with its Wilson 95 % interval and the number it was counted over."""
    low, high = wilson_interval(int(hits.sum()), len(hits))
    return {"estimate": float(hits.mean()), "low": low, "high": high, "n": len(hits)}


def accuracy_by_slice(evidence: Evidence, columns: Sequence[str], buckets: int) -> dict[str, dict[str, dict[str, float]]]:
    """Accuracy by the values of columns, by length, by who is longer, and by margin (the annotator's and the model's)."""
    keys: dict[str, Sequence[str]] = {column: [str(row.get(column)) for row in evidence.rows] for column in columns}
    keys["length"] = _buckets(evidence.sizes, buckets)
    if evidence.paired:
        words = {-1.0: "preferred is shorter", 0.0: "equally long", 1.0: "preferred is longer"}
        keys["longer"] = [words[sign] for sign in np.sign(evidence.lengths).tolist()]
    if evidence.margins.any():
        keys["margin"] = _buckets(evidence.margins, buckets)
    keys["score margin"] = _buckets(np.abs(evidence.scores), buckets)
    return {
        name: {key: proportion(evidence.right[np.array(values) == key]) for key in sorted(set(values))} for name, values in keys.items()
    }


def _buckets(x: np.ndarray, count: int) -> list[str]:
    """Names of parts of about equal size, in an order that sorting keeps."""
    edges = np.unique(np.quantile(x, np.linspace(0, 1, count + 1)))
    index = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, max(len(edges) - 2, 0))
    return [f"{i + 1}: {edges[i]:.3g} to {edges[min(i + 1, len(edges) - 1)]:.3g}" for i in index]


def length_bias(evidence: Evidence) -> dict[str, dict[str, float] | None]:
    """How far length goes with score and with judgement, and what it adds to the judgement beyond the score.

    score:    correlation of score with length (of their differences, for pairs).
    judgement: correlation of what was preferred with length.
    per_point, per_token: coefficients of P(preferred) = sigma(a score + b length): b is the length bias of the judges that the
              model does not share (or, below zero, that it exaggerates), in log-odds per token.
    """
    n, length = len(evidence.scores), evidence.mirrored(evidence.lengths)
    score, label = evidence.mirrored(evidence.scores), evidence.seen_labels
    constant = [] if evidence.paired else [np.ones(n)]
    features = np.stack([evidence.scores, evidence.lengths, *constant], axis=1)
    fit = _attempt(lambda: logistic_regression(features, evidence.labels.tolist()))
    return {
        "score": _plain(_attempt(lambda: correlation(score.tolist(), length.tolist(), n))),
        "judgement": _plain(_attempt(lambda: correlation(label.tolist(), length.tolist(), n))),
        "per_point": _plain(fit and fit[0]),
        "per_token": _plain(fit and fit[1]),
    }


def noise(evidence: Evidence) -> dict[str, float] | None:
    """The share of flipped labels (see `maths.audit.label_noise`), taking the model's order of responses as the truth.

    A model that has learnt its own labels by heart hides their noise: use held-out judgements.
    """
    fit = _attempt(lambda: label_noise((evidence.scores * (2 * evidence.labels - 1)).tolist()))
    return fit and {**asdict(fit.noise), "scale": fit.scale}


def disagreement(one: Evidence, other: Evidence) -> dict[str, Any]:
    """How often two models prefer differently (or, for labels, are on different sides of 0), and how their scores go together."""
    return {
        "disagree": proportion((one.scores > 0) != (other.scores > 0)),
        "correlation": _plain(_attempt(lambda: correlation(one.scores.tolist(), other.scores.tolist()))),
        "accuracy": proportion(other.right),
    }


def _attempt(estimate: Callable[[], Any]) -> Any:
    """An estimate, or None where the data do not allow it."""
    try:
        return estimate()
    except ValueError:
        return None


def _plain(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def table_rows(result: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any] | None]]:
    """The audit as lines of a table: name, and the estimate with its interval."""
    rows: list[tuple[str, Mapping[str, Any] | None]] = [("accuracy", result["accuracy"])]
    rows += [(f"accuracy, {name} {key}", value) for name, values in result["slices"].items() for key, value in values.items()]
    rows.append(("calibration error", {"estimate": result["calibration"]["error"]}))
    names = {
        "score": "correlation of score and length", "judgement": "correlation of preference and length",
        "per_point": "log-odds per point of score", "per_token": "log-odds per token of length, beyond the score",
    }  # fmt: skip
    rows += [(words, result["length"][name]) for name, words in names.items()]
    rows.append(("share of flipped labels", result["noise"]))
    for path, found in result["others"].items():
        rows += [(f"{path}: {name}", found[name]) for name in ("disagree", "correlation", "accuracy")]
    return rows
