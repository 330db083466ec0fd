"""What reward models learn: the losses of `trimtab reward`, on columns of scores.

bradley-terry   -log sigma(r(x, y_chosen) - r(x, y_rejected) - margin)      over all pairs of every prompt
plackett-luce   -log P(the whole ranking)
hinge           max(0, margin - (r(x, y_chosen) - r(x, y_rejected)))
pointwise       (rating - r(x, y))^2
process         -log P(label) of every judged step, read at its last token
outcome         -log P(label of the response) at every token of it

Columns read: judgement, margin, probability and weight_k (of head k; responses); label and judged (steps; tokens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trimtab.algorithms.base import over_pairs
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.config import Config
from trimtab.maths import reward_losses
from trimtab.maths.reductions import aggregate

Kind = Literal["bradley-terry", "plackett-luce", "hinge", "pointwise", "process", "outcome"]
READS: Mapping[Kind, Literal["response", "step", "token"]] = {
    "bradley-terry": "response", "plackett-luce": "response", "hinge": "response", "pointwise": "response", "process": "step",
    "outcome": "token",
}  # fmt: skip
"""Where a loss reads the score: at the end of a response, at the end of its steps, or at every token."""


class RewardLossConfig(Config):
    """What is learnt from which judgements."""

    kind: Kind = Field(
        "bradley-terry",
        description="bradley-terry and hinge: all pairs of every prompt; plackett-luce: whole rankings; pointwise: ratings, by squared "
        "error; process: labels of steps; outcome: one label per response, learnt at every token",
    )
    margin: float | None = Field(
        None, ge=0, description="how far apart a pair should be, on top of the row's own margin (null: 1 for hinge, else 0)"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="bradley-terry: assumed probability that a label is flipped")
    centring: float = Field(
        0.01, ge=0, description="pairs and rankings: weight of (r_chosen + r_rejected)^2, which pins the scores' free constant near 0"
    )

    @model_validator(mode="after")
    def _used(self) -> RewardLossConfig:
        if self.label_smoothing and self.kind != "bradley-terry":
            raise ValueError("loss.label_smoothing is of bradley-terry only")
        if self.margin is not None and self.kind not in ("bradley-terry", "hinge"):
            raise ValueError("loss.margin is of bradley-terry and hinge only")
        return self


def reward_loss(config: RewardLossConfig) -> Callable[[Outputs, Batch, Counts], Loss]:
    """The loss of a recipe, for outputs of `scores` (every head its own loss; their mean counts) or `token_scores`."""

    def of_tokens(outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.token_scores is not None
        return _token_loss(outputs.token_scores, batch, counts, config.kind)

    def of_responses(outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        assert outputs.members is not None
        heads = outputs.members.unbind(1)
        parts = [_response_loss(r, batch.responses.get(f"weight_{k}"), batch, counts, config) for k, r in enumerate(heads)]
        value = torch.stack([part.value for part in parts]).mean()
        return Loss(value, {name: torch.stack([part.means[name] for part in parts]).mean() for name in parts[0].means})

    return of_responses if READS[config.kind] == "response" else of_tokens


def _response_loss(r: Tensor, weight: Tensor | None, batch: Batch, counts: Counts, config: RewardLossConfig) -> Loss:
    """One head's loss; `weight` is per response."""
    weight = torch.ones_like(r) if weight is None else weight.to(r.dtype)
    if config.kind == "pointwise":
        terms = reward_losses.pointwise(r, batch.responses["judgement"].to(r.dtype))
        return Loss((terms * weight).sum() / counts.responses, {"loss/squared_error": terms.sum() / counts.responses})
    better, worse = batch.pairs()

    def mean(x: Tensor) -> Tensor:
        return over_pairs(x, batch, counts)

    centring = config.centring * mean(weight[better] * reward_losses.centring(r[better], r[worse]))
    means = {"train/accuracy": mean((r[better] > r[worse]).double()), "train/margin": mean(r[better] - r[worse])}
    if config.kind == "plackett-luce":
        terms = _rankings(r, batch)
        return Loss((terms * weight).sum() / counts.groups + centring, {"loss/ranking": terms.sum() / counts.groups, **means})
    terms = _pair_terms(r[better], r[worse], better, batch, config)
    return Loss(mean(weight[better] * terms) + centring, {"loss/pair": mean(terms), **means})


def _pair_terms(r_better: Tensor, r_worse: Tensor, better: Tensor, batch: Batch, config: RewardLossConfig) -> Tensor:
    margin, probability = (batch.responses[name][better].to(r_better.dtype) for name in ("margin", "probability"))
    if config.kind == "hinge":
        return reward_losses.hinge(r_better, r_worse, margin + (1.0 if config.margin is None else config.margin))
    return reward_losses.bradley_terry(r_better, r_worse, margin + (config.margin or 0.0), probability, config.label_smoothing)


def _rankings(r: Tensor, batch: Batch) -> Tensor:
    """The Plackett-Luce terms of every group's ranking, one per response (in the order of the ranking)."""
    sizes = [len(group.responses) for group in batch.groups]
    judged = batch.responses["judgement"].split(sizes)
    lists = [reward_losses.plackett_luce(own[said.argsort(descending=True)]) for own, said in zip(r.split(sizes), judged, strict=True)]
    return torch.cat(lists)


def _token_loss(logits: Tensor, batch: Batch, counts: Counts, kind: Kind) -> Loss:
    """Every response weighs the same, and within it every judged step or token."""
    owner = batch.response_of_token
    if kind == "process":
        mask, label = batch.tokens["judged"], batch.tokens["label"].to(logits.dtype)
        terms = reward_losses.process_bce(logits, label, mask)
    else:
        mask, outcome = batch.mask, batch.responses["judgement"].to(logits.dtype)
        terms, label = reward_losses.outcome_bce(logits, outcome, owner, mask), outcome[owner]

    def mean(x: Tensor) -> Tensor:
        return aggregate(x, mask, owner, "sequence", tokens=counts.tokens, responses=counts.responses)

    right = ((logits > 0) == (label > 0.5)).to(logits.dtype)
    return Loss(mean(terms), {f"loss/{kind}": mean(terms), "train/accuracy": mean(right)})
