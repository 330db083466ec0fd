"""Losses that train a reward model on human judgements: one term per pair, place, response, step or segment.

r is a score, sigma the logistic function. Every function returns terms that are to be minimised, so squares carry a plus
sign; some textbooks print a minus before the pointwise, segment and centring squares, whose minimum is at infinity.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus


def bradley_terry(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    margin: Float[Tensor, " pairs"] | float = 0.0,
    probability: Float[Tensor, " pairs"] | float = 1.0,
    smoothing: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """Negative log-likelihood of a choice, z = r(x, y_chosen) - r(x, y_rejected) - margin:

        -q log sigma(z) - (1 - q) log sigma(-z),      q = p (1 - smoothing) + (1 - p) smoothing

    p is the probability that `chosen` is the better one (1: a plain choice, and -log sigma(z)); `smoothing` is the assumed
    share of flipped labels. Gradient: sigma(z) - q for r_chosen, its negative for r_rejected. Unchanged when a function of x
    alone is added to r. Sources: Bradley and Terry 1952; the margin: Touvron et al. 2023; soft labels: Lee et al. 2023.
    """
    logit = chosen - rejected - margin
    certain = probability * (1 - smoothing) + (1 - probability) * smoothing
    return -certain * logsigmoid(logit) - (1 - certain) * logsigmoid(-logit)


def hinge(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], margin: Float[Tensor, " pairs"] | float = 1.0
) -> Float[Tensor, " pairs"]:
    """max(0, margin - (r_chosen - r_rejected)): nothing more is asked of a pair that is apart by the margin.

    Gradient: -1 for r_chosen and +1 for r_rejected within the margin, exactly 0 beyond it. Source: Joachims 2002.
    """
    return torch.relu(margin - (chosen - rejected))


def centring(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """(r_chosen + r_rejected)^2: added with a small weight, it pins the free constant c(x) near 0.

    Gradient: 2 (r_chosen + r_rejected) for both, so it moves them together and leaves their difference alone.
    Source: Eisenstein et al. 2023. It is added to the loss; subtracting it, as printed in some texts, would reward large sums.
    """
    return (chosen + rejected).square()


def list_sum(scores: Float[Tensor, " items"]) -> Float[Tensor, " pairs"]:
    """A ranking as all its pairs: -log sigma(r_a - r_b) for the K (K - 1) / 2 pairs a before b; scores stand best first.

    Each pair once, in the order that was judged: summing both orders, as printed in some texts, asks for all scores to be
    equal. Its mean over the pairs is the loss of Ouyang et al. 2022, eq. 1.
    """
    better, worse = torch.triu_indices(len(scores), len(scores), offset=1, device=scores.device)
    return -logsigmoid(scores[better] - scores[worse])


def plackett_luce(scores: Float[Tensor, " items"]) -> Float[Tensor, " items"]:
    """Negative log-likelihood of a ranking as K choices, each from what is left; scores stand best first:

        -log [exp(r_k) / sum_{j >= k} exp(r_j)],      k = 1 .. K

    The last term is 0, and K = 2 is Bradley-Terry. Gradient of the sum for r_i: sum_{k <= i} P(i chosen at k) - 1.
    Unchanged when a constant is added to all scores. Sources: Luce 1959; Plackett 1975.
    """
    left = torch.logcumsumexp(scores.flip(0), dim=0).flip(0)
    return left - scores


def pointwise(scores: Float[Tensor, " responses"], ratings: Float[Tensor, " responses"]) -> Float[Tensor, " responses"]:
    """(rating - r(x, y))^2: regression on an absolute rating. Gradient: 2 (r - rating). The sign is plus."""
    return (ratings - scores).square()


def process_bce(
    logits: Float[Tensor, " tokens"], labels: Float[Tensor, " tokens"], mask: Bool[Tensor, " tokens"]
) -> Float[Tensor, " tokens"]:
    """-y log p - (1 - y) log(1 - p), p = sigma(logit), at the last token of every judged step; 0 where `mask` is False.

    Labels and scores of masked tokens (inside a step, or of a neutral step) are never looked at: they may be NaN. Gradient:
    p - y. Sources: Uesato et al. 2022; Lightman et al. 2023.
    """
    logit, label = (torch.where(mask, column, 0.0) for column in (logits, labels))
    return torch.where(mask, softplus(logit) - label * logit, 0.0)


def outcome_bce(
    logits: Float[Tensor, " tokens"],
    outcome: Float[Tensor, " responses"],
    response_of_token: Int[Tensor, " tokens"],
    mask: Bool[Tensor, " tokens"],
) -> Float[Tensor, " tokens"]:
    """`process_bce` at every token, each against the label of its whole response: p_t says how the response will end.

    Source: Cobbe et al. 2021.
    """
    return process_bce(logits, outcome[response_of_token], mask)


def segment_hinge(scores: Float[Tensor, " segments"], signs: Float[Tensor, " segments"]) -> Float[Tensor, " segments"]:
    """max(0, 1 - r s) of a segment that is good (s = 1) or bad (s = -1). Gradient: -s where r s < 1, else 0."""
    return torch.relu(1 - scores * signs)


class Calibration(NamedTuple):
    """What was predicted and what happened, by bins of the predicted probability; empty bins are left out."""

    error: float
    predicted: list[float]
    observed: list[float]
    counts: list[int]


def calibration(probabilities: Float[Tensor, " n"], outcomes: Float[Tensor, " n"], bins: int = 10) -> Calibration:
    """Expected calibration error over bins of equal width: sum_b (n_b / n) |mean outcome - mean probability|.

    Source: Guo et al. 2017, eq. 3.
    """
    index = (probabilities * bins).long().clamp(0, bins - 1)
    counts = torch.bincount(index, minlength=bins)
    seen = counts > 0
    predicted, observed = (
        torch.bincount(index, weights=x.double(), minlength=bins)[seen] / counts[seen] for x in (probabilities, outcomes)
    )
    error = float(((predicted - observed).abs() * counts[seen]).sum() / len(probabilities))
    return Calibration(error, predicted.tolist(), observed.tolist(), counts[seen].tolist())


def normalisation(scores: Float[Tensor, " n"], mean: float = 0.0, deviation: float = 1.0) -> tuple[float, float]:
    """Gain g = sd_target / sd and bias b = mean_target - g mean, so that g r + b has the target mean and standard deviation.

    The standard deviation is the biased one. Raises ValueError if all scores are equal. Source: Ziegler et al. 2019;
    Huang et al. 2023, reward-model detail 3.
    """
    spread = float(scores.double().std(correction=0))
    if not spread > 0:
        raise ValueError("all scores are equal: there is no spread to normalise")
    gain = deviation / spread
    return gain, mean - gain * float(scores.double().mean())
