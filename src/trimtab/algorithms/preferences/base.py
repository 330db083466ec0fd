"""What preference losses share: how log-ratios are made of tokens, how terms are averaged, and what is reported.

A loss looks at pairs of responses (`PairLoss`) or at single ones that are desirable or not (`LabelLoss`). Columns of a batch:

    logprobs_ref    the reference's log-probabilities (token column); absent where no reference is needed
    logprobs_now    the policy's, before the update and without gradient, where `needs_own` (token column)
    judgement       higher is better, within a prompt; desirable: 1, 0, or 0.5 where there is no opinion; probability: how sure it
                    is that the better response of a pair is better (response columns)

Where terms depend on a whole minibatch, `prepare` sees it whole and leaves what it has found in response columns, so that the
loss of a micro-batch needs nothing else. Everything is computed in float64 from the models' log-probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from trimtab.algorithms.base import ReferenceConfig, Role, over_pairs
from trimtab.batch import Batch, Counts, Loss, Outputs
from trimtab.config import Config
from trimtab.maths.preference_losses import desensitised_weights, wpo_weights

LogRatio = Literal["sum", "mean", "desensitised"]


class NoReferenceConfig(ReferenceConfig):
    """None, unless one is asked for."""

    role: Role = Field("none", description="none: no reference, h = log pi; frozen, synced, ema: as for other losses")


class MovingReferenceConfig(ReferenceConfig):
    """One that follows the policy."""

    role: Role = Field("synced", description="synced: a copy of the policy, taken anew every few steps; ema: a moving average of it")


def beta_field(default: float) -> Any:
    return Field(default, gt=0, description="strength of the implied KL penalty: higher stays nearer the reference")


def smoothing_field(default: float = 0.0) -> Any:
    return Field(default, ge=0, lt=0.5, description="assumed probability that a label is flipped")


def nll_field(default: float) -> Any:
    return Field(default, ge=0, description="weight of the negative log-likelihood of the chosen response, added to the loss")


def nll_per_token_field(default: bool) -> Any:
    return Field(default, description="that likelihood as a mean over the response's tokens (false: their sum)")


def log_ratio_field(default: LogRatio) -> Any:
    return Field(
        default,
        description="h of a response: sum over its tokens; mean per token; or desensitised: "
        "tokens beyond the length of the shorter response of the pair count tail_weight",
    )


def reference_field(kind: type[ReferenceConfig]) -> Any:
    return Field(default_factory=kind, description="which policy the log-ratios are taken against")


class PreferenceLossConfig(Config):
    """Settings of every preference loss."""

    reference: ReferenceConfig = reference_field(ReferenceConfig)
    nll_weight: float = nll_field(0.0)
    nll_per_token: bool = nll_per_token_field(True)

    @property
    def scale(self) -> float:
        """The factor that makes a log-ratio a reward."""
        return 1.0


class PairConfig(PreferenceLossConfig):
    """Settings of every loss on pairs."""

    log_ratio: LogRatio = log_ratio_field("sum")
    tail_weight: float = Field(0.3, ge=0, le=1, description="desensitised: weight of tokens beyond the pair's public length")
    weighting: Literal["none", "wpo"] = Field(
        "none", description="wpo: a pair counts as much as the policy itself would sample it, exp of its mean log-probabilities"
    )


class LabelConfig(PreferenceLossConfig):
    """Settings of every loss on single responses."""

    log_ratio: Literal["sum", "mean"] = Field("sum", description="h of a response: sum over its tokens, or mean per token")
    beta: float = beta_field(0.1)

    @property
    def scale(self) -> float:
        return self.beta


class PreferenceLoss:
    """Base of all preference losses. `data` says what it reads, `needs_*` what the stage computes before `prepare`.

    needs_own:        column logprobs_now of the minibatch.
    needs_mismatched: a second batch, every prompt with a response to another prompt, with logprobs_now and logprobs_ref.
    """

    data: Literal["pairs", "labels"]
    needs_own: bool = False
    needs_mismatched: bool = False

    def __init__(self, config: Any, name: str) -> None:
        self.config, self.name = config, name
        self.reference: ReferenceConfig = config.reference

    def prepare(self, batch: Batch, mismatched: Batch | None = None, *, training: bool = True) -> Batch:
        """The minibatch with what the loss needs to know of all of it. Without `training`, no state changes."""
        return batch

    def loss(self, outputs: Outputs, batch: Batch, counts: Counts) -> Loss:
        """A micro-batch's share of the loss, with its metrics."""
        assert outputs.logprobs is not None
        value = self.preference(outputs.logprobs, batch, counts)
        means = {f"loss/{self.name}": value}
        if self.config.nll_weight:
            nll = self.nll(outputs.logprobs, batch, counts)
            means["loss/nll"] = nll
            value = value + self.config.nll_weight * nll
        with torch.no_grad():
            means |= self.metrics(outputs.logprobs.detach(), batch, counts)
        return Loss(value, means)

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        """The loss itself: this micro-batch's share."""
        raise NotImplementedError

    def nll(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        """Mean negative log-likelihood of the better responses."""
        raise NotImplementedError

    def metrics(self, logprobs: Tensor, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        raise NotImplementedError

    def correct(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """For every pair (or labelled response), whether the policy agrees with the judgement."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What decides the future of a run, as JSON values. The weights of a moving reference are saved as a model instead."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return

    def token_log_ratios(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """log pi - log pi_ref of every token, 0 where it is not the assistant's own; log pi without a reference."""
        against = 0.0 if self.reference.role == "none" else batch.tokens["logprobs_ref"].double()
        return (logprobs.double() - against) * batch.mask

    def log_ratios(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """h of every response, as sum or mean over its own tokens."""
        return self.over_tokens(self.token_log_ratios(logprobs, batch), batch)

    def over_tokens(self, column: Tensor, batch: Batch) -> Tensor:
        """A masked token column as one number per response: its sum or mean, as the settings say."""
        return mean_by_response(column, batch) if self.config.log_ratio == "mean" else batch.sum_by_response(column)

    def likelihood(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """log pi of every response, per token or summed as the settings say."""
        column = logprobs.double() * batch.mask
        return mean_by_response(column, batch) if self.config.nll_per_token else batch.sum_by_response(column)


class PairLoss(PreferenceLoss):
    """A loss whose terms are a function of (h_chosen, h_rejected); a subclass states `terms`.

    All pairs of a prompt are used; they weigh as much as one together, and prompts weigh the same. A choice that is sure only with
    probability p costs p terms(chosen, rejected) + (1 - p) terms(rejected, chosen).
    """

    data: Literal["pairs", "labels"] = "pairs"

    def terms(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        raise NotImplementedError

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        chosen, rejected = self.pair_log_ratios(logprobs, batch)
        terms, sure = self.terms(chosen, rejected), batch.responses.get("probability")
        if sure is not None and bool((sure < 1).any()):
            p = sure[batch.pairs()[0]]
            terms = p * terms + (1 - p) * self.terms(rejected, chosen)
        if self.config.weighting == "wpo":
            better, worse = batch.pairs()
            mean = mean_by_response(logprobs.detach().double() * batch.mask, batch)
            terms = terms * wpo_weights(mean[better], mean[worse])
        return over_pairs(terms, batch, counts)

    def nll(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        better, _ = batch.pairs()
        return over_pairs(-self.likelihood(logprobs, batch)[better], batch, counts)

    def pair_log_ratios(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """h of the better and of the worse response of every pair."""
        better, worse = batch.pairs()
        if self.config.log_ratio != "desensitised":
            h = self.log_ratios(logprobs, batch)
            return h[better], h[worse]
        column, own = self.token_log_ratios(logprobs, batch), own_tokens(batch)
        public = torch.minimum(own[better], own[worse])
        alpha = self.config.tail_weight
        return _desensitised(column, batch, better, public, alpha), _desensitised(column, batch, worse, public, alpha)

    def metrics(self, logprobs: Tensor, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        better, worse = batch.pairs()
        chosen, rejected = (self.config.scale * h for h in self.pair_log_ratios(logprobs, batch))
        total = batch.sum_by_response(logprobs.double() * batch.mask)
        columns = {
            "train/accuracy": (chosen > rejected).double(),
            "train/margin": chosen - rejected,
            "reward/chosen": chosen,
            "reward/rejected": rejected,
            "logprob/chosen": total[better],
            "logprob/rejected": total[worse],
        }
        return {name: over_pairs(column, batch, counts) for name, column in columns.items()}

    def correct(self, logprobs: Tensor, batch: Batch) -> Tensor:
        chosen, rejected = self.pair_log_ratios(logprobs, batch)
        return chosen > rejected


class LabelLoss(PreferenceLoss):
    """A loss whose terms are a function of h, the label and a `baseline`; a subclass states `terms` and `find_baseline`.

    The baseline is the h of a response that is neither desirable nor undesirable, one number for the whole minibatch.
    """

    data: Literal["pairs", "labels"] = "labels"

    def terms(self, h: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        raise NotImplementedError

    def find_baseline(self, batch: Batch, mismatched: Batch | None, *, training: bool) -> float:
        raise NotImplementedError

    def prepare(self, batch: Batch, mismatched: Batch | None = None, *, training: bool = True) -> Batch:
        label = batch.responses["desirable"]
        good, bad = (label == 1).to(label.dtype), (label == 0).to(label.dtype)
        baseline = self.find_baseline(batch, mismatched, training=training)
        return batch.with_responses(
            **{f"{self.name}_baseline": torch.full_like(label, baseline)},
            share=(good + bad) / (good + bad).sum().clamp(min=1),
            class_share=good / good.sum().clamp(min=1) + bad / bad.sum().clamp(min=1),
        )

    def baseline(self, batch: Batch) -> Tensor:
        return batch.responses[f"{self.name}_baseline"]

    def preference(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        terms = self.terms(self.log_ratios(logprobs, batch), batch.responses["desirable"] == 1, self.baseline(batch))
        return (terms * batch.responses["share"]).sum()

    def nll(self, logprobs: Tensor, batch: Batch, counts: Counts) -> Tensor:
        weight = batch.responses["class_share"] * (batch.responses["desirable"] == 1)
        return -(self.likelihood(logprobs, batch) * weight).sum()

    def metrics(self, logprobs: Tensor, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        label, share, of_class = (batch.responses[name] for name in ("desirable", "share", "class_share"))
        h = self.log_ratios(logprobs, batch)
        reward, total = self.config.scale * h, batch.sum_by_response(logprobs.double() * batch.mask)
        right = ((h > self.baseline(batch)) == (label == 1)).double()
        good, bad = of_class * (label == 1), of_class * (label == 0)
        return {
            "train/accuracy": (right * share).sum(),
            "train/margin": (reward * (good - bad)).sum(),
            "reward/desirable": (reward * good).sum(),
            "reward/undesirable": (reward * bad).sum(),
            "reward/baseline": self.config.scale * self.baseline(batch).sum() / counts.responses,
            "logprob/desirable": (total * good).sum(),
            "logprob/undesirable": (total * bad).sum(),
        }

    def correct(self, logprobs: Tensor, batch: Batch) -> Tensor:
        label = batch.responses["desirable"]
        right = (self.log_ratios(logprobs, batch) > self.baseline(batch)) == (label == 1)
        return right[label != 0.5]


def own_tokens(batch: Batch) -> Tensor:
    """The assistant's own tokens in every response."""
    return batch.sum_by_response(batch.mask.long())


def mean_by_response(column: Tensor, batch: Batch) -> Tensor:
    """A masked token column averaged over each response's own tokens."""
    return batch.sum_by_response(column) / own_tokens(batch).clamp(min=1)


def _desensitised(column: Tensor, batch: Batch, response: Tensor, public: Tensor, alpha: float) -> Tensor:
    """For every pair, the sum over its `response`'s tokens, own tokens beyond the pair's public length times alpha."""
    lengths = torch.tensor(batch.lengths)
    before = torch.cat([torch.zeros(1, dtype=torch.long), batch.mask.long().cumsum(0)])
    position = before[1:] - 1 - before[(batch.last_token - lengths + 1)][batch.response_of_token]
    size = lengths[response]
    pair = torch.repeat_interleave(torch.arange(len(response)), size)
    cells = torch.arange(len(pair)) + (batch.last_token[response] + 1 - size.cumsum(0))[pair]
    weighted = column[cells] * desensitised_weights(position[cells], public[pair], alpha)
    return column.new_zeros(len(response)).index_add(0, pair, weighted)
