"""Losses on preferences, from log-probabilities of whole responses. Every function returns terms; nothing is added up here.

    h = log pi(y | x) - log pi_ref(y | x),     Delta = h_chosen - h_rejected,     s = the logistic function

The optimum of E[r] - beta KL satisfies r = beta (h + log Z(x)); the partition function cancels in differences, so a preference
between two responses is a statement about Delta. Losses that look at one response alone need a baseline in place of log Z.

`chosen` and `rejected` are h of the two responses, one entry per pair, unless a function says otherwise. The gradients in the
docstrings are with respect to h_chosen (d_w) and h_rejected (d_l); for losses in Delta alone, d_l = -d_w.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon", "alpha"]


def dpo(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float, label_smoothing: float = 0.0
) -> Float[Tensor, " pairs"]:
    """-(1 - e) log s(beta Delta) - e log s(-beta Delta), e = label_smoothing.

    e = 0 is DPO (Rafailov et al. 2023, eq. 7); e > 0 is the conservative form for labels that are wrong with probability e
    (Mitchell 2023). d_w = beta (s(beta Delta) - (1 - e)).
    """
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def robust_dpo(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float, label_smoothing: float
) -> Float[Tensor, " pairs"]:
    """[-(1 - e) log s(beta Delta) + e log s(-beta Delta)] / (1 - 2e): its mean over labels flipped with probability e is DPO's loss.

    Source: Chowdhury et al. 2024, eq. 12. d_w = beta [-(1 - e) s(-beta Delta) - e s(beta Delta)] / (1 - 2e).
    """
    margin, e = beta * (chosen - rejected), label_smoothing
    return (-(1 - e) * logsigmoid(margin) + e * logsigmoid(-margin)) / (1 - 2 * e)


def ipo(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], tau: float) -> Float[Tensor, " pairs"]:
    """(Delta - 1 / (2 tau))^2: the margin is drawn to a finite value, so certain labels do not drive it to infinity.

    Source: Azar et al. 2023, eq. 17, on sums over tokens; some libraries take means per token instead, which is the same
    function of other h. d_w = 2 (Delta - 1 / (2 tau)).
    """
    return (chosen - rejected - 1 / (2 * tau)) ** 2


def hinge(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """max(0, 1 - beta Delta). Source: SLiC (Zhao et al. 2023), with the reference as in RSO (Liu et al. 2023, eq. 9).

    d_w = -beta where beta Delta < 1, else 0.
    """
    return torch.relu(1 - beta * (chosen - rejected))


def kto(
    h: Float[Tensor, " responses"],
    desirable: Bool[Tensor, " responses"],
    baseline: Float[Tensor, " responses"],
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Tensor, " responses"]:
    """w_D (1 - s(beta (h - z))) for desirable responses, w_U (1 - s(beta (z - h))) for undesirable ones.

    baseline: z = max(0, KL(pi || pi_ref)) in nats, estimated without gradient. Source: Ethayarajh et al. 2024, eq. 8.
    d = -w_D beta s'(beta (h - z)), or +w_U beta s'(beta (h - z)).
    """
    sign, weight = _sign(desirable, h), torch.where(desirable, h.new_tensor(desirable_weight), h.new_tensor(undesirable_weight))
    return weight * torch.sigmoid(-sign * beta * (h - baseline))


def bco(
    h: Float[Tensor, " responses"], desirable: Bool[Tensor, " responses"], delta: Float[Tensor, " responses"], beta: float
) -> Float[Tensor, " responses"]:
    """-log s(beta h - delta) for desirable responses, -log s(-(beta h - delta)) for undesirable ones.

    delta: the reward of an average response, without gradient. Source: Jung et al. 2024, eq. 10.
    d = -beta s(delta - beta h), or +beta s(beta h - delta).
    """
    return -logsigmoid(_sign(desirable, h) * (beta * h - delta))


def _sign(desirable: Tensor, like: Tensor) -> Tensor:
    return 2 * desirable.to(like.dtype) - 1


def bco_pair(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """-log s(beta h_w) - log s(-beta h_l): BCO with delta = 0 on both responses of a pair.

    d_w = -beta s(-beta h_w), d_l = beta s(beta h_l).
    """
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def odds_ratio(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """-log s(log odds_w - log odds_l), odds = p / (1 - p), where log p is the mean log-probability per token.

    chosen, rejected: those means (no reference). Source: ORPO (Hong et al. 2024, eq. 6 and 7).
    d_w = -s(-D) / (1 - p_w), d_l = s(-D) / (1 - p_l), D the difference of log odds.
    """
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logprob: Tensor) -> Tensor:
    logprob = logprob.clamp(max=-1e-7)  # a probability that rounds to 1 has no finite odds
    return logprob - torch.log(-torch.expm1(logprob))


def simpo(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float, gamma: float) -> Float[Tensor, " pairs"]:
    """-log s(beta (l_w - l_l) - gamma).

    chosen, rejected: l, the mean log-probability per token (no reference). Source: Meng et al. 2024, eq. 6.
    d_w = -beta s(gamma - beta (l_w - l_l)).
    """
    return -logsigmoid(beta * (chosen - rejected) - gamma)


def exo_pair(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float, label_smoothing: float
) -> Float[Tensor, " pairs"]:
    """q_w (log q_w - log(1 - e)) + q_l (log q_l - log e), q_w = s(beta Delta) = 1 - q_l: KL from the policy's choice to the label.

    Source: Ji et al. 2024, eq. 17 with K = 2. d_w = beta q_w q_l (beta Delta - log((1 - e) / e)): least where beta Delta is
    the log odds of the label. Raises ValueError unless 0 < e < 1: for certain labels the divergence is infinite.
    """
    if not 0 < label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}; EXO's divergence is finite only between 0 and 1")
    margin = beta * (chosen - rejected)
    label = torch.tensor([1 - label_smoothing, label_smoothing], dtype=margin.dtype).log()
    return torch.sigmoid(margin) * (logsigmoid(margin) - label[0]) + torch.sigmoid(-margin) * (logsigmoid(-margin) - label[1])


def nca_pair(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """-log s(beta h_w) - log s(-beta h_w) / 2 - log s(-beta h_l) / 2: keeps the chosen response's own probability up.

    Source: Chen et al. 2024 (noise contrastive alignment), K = 2. d_w = beta (3 s(beta h_w) / 2 - 1), d_l = beta s(beta h_l) / 2.
    """
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def aot(upper: Float[Tensor, " n"], lower: Float[Tensor, " m"], beta: float, label_smoothing: float = 0.0) -> Float[Tensor, " intervals"]:
    """(Conservative) DPO on order statistics: the whole distribution of `upper` shall lie above that of `lower`.

    unpaired: upper = h of desirable responses, lower = h of undesirable ones. paired: upper = log pi_w - log pi_l,
    lower = log pi_ref,w - log pi_ref,l. The loss is the mean of the terms, the integral over t in (0, 1) of
    dpo(Q_upper(t), Q_lower(t)), Q being quantile functions; for n = m that is the k-th smallest against the k-th smallest,
    otherwise each interval between neighbouring levels i/n, j/m is a term, scaled by its width.
    Source: Melnyk et al. 2024, eq. 5 to 8. d of the k-th smallest: that of DPO with its counterpart.
    """
    n, m = len(upper), len(lower)
    edges = torch.unique(torch.cat([torch.arange(n + 1) * m, torch.arange(m + 1) * n]))
    start, width = edges[:-1], torch.diff(edges).to(upper.dtype) / (n * m)
    terms = dpo(upper.sort().values[start // m], lower.sort().values[start // n], beta, label_smoothing)
    return terms * width * len(width)


def apo_zero(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """1 - s(beta h_w) + s(beta h_l): the chosen response up, the rejected one down, each against the reference.

    For data better than the policy. Source: D'Oosterlinck et al. 2024, eq. 6. d_w = -beta s'(beta h_w), d_l = beta s'(beta h_l).
    """
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """s(beta h_w) + 1 - s(beta Delta): both down, the rejected one further.

    For data worse than the policy. Source: D'Oosterlinck et al. 2024, eq. 7.
    d_w = beta (s'(beta h_w) - s'(beta Delta)), d_l = beta s'(beta Delta).
    """
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def discopop(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float, tau: float) -> Float[Tensor, " pairs"]:
    """(1 - m) (-log s(x)) + m exp(-x), x = beta Delta, m = s(x / tau): logistic below zero, exponential above.

    Source: Lu et al. 2024, eq. 5 (found by search). d_w = beta [m (1 - m) / tau (exp(-x) + log s(x)) - (1 - m) s(-x) - m exp(-x)].
    """
    x = beta * (chosen - rejected)
    return -torch.sigmoid(-x / tau) * logsigmoid(x) + torch.exp(logsigmoid(x / tau) - x)


def sppo_hard(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float) -> Float[Tensor, " pairs"]:
    """(h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2: each log-ratio towards its own target.

    Source: Wu et al. 2024, eq. 4.6 with win probabilities 1 and 0. d_w = 2 (h_w - 1 / (2 beta)), d_l = 2 (h_l + 1 / (2 beta)).
    """
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def f_dpo(
    chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"], beta: float, divergence: Divergence, alpha: float = 0.5
) -> Float[Tensor, " pairs"]:
    """-log s(beta f'(exp h_w) - beta f'(exp h_l)): DPO for a penalty D_f(pi || pi_ref) other than reverse KL.

    Source: Wang et al. 2023, eq. 13. d_w = -beta s(-beta D) g'(h_w), d_l = beta s(-beta D) g'(h_l), where D is the difference
    of `divergence_link` g, whose derivatives are stated there.
    """
    return -logsigmoid(beta * (divergence_link(chosen, divergence, alpha) - divergence_link(rejected, divergence, alpha)))


def divergence_link(h: Float[Tensor, " n"], divergence: Divergence, alpha: float = 0.5) -> Float[Tensor, " n"]:
    """g(h) = f'(exp h), without additive constants.

    reverse_kl      f(u) = u log u                              g = h                        g' = 1
    forward_kl      f(u) = -log u                               g = -exp(-h)                 g' = exp(-h)
    jensen_shannon  f(u) = u log u - (u + 1) log((u + 1) / 2)   g = log s(h)                 g' = s(-h)
    alpha           f'(u) = (1 - u^-alpha) / alpha              g = (1 - exp(-alpha h)) / alpha   g' = exp(-alpha h)

    alpha -> 0 is reverse KL, alpha = 1 is forward KL up to a constant.
    """
    if divergence == "reverse_kl":
        return h
    if divergence == "forward_kl":
        return -torch.exp(-h)
    if divergence == "jensen_shannon":
        return logsigmoid(h)
    return -torch.expm1(-alpha * h) / alpha


def plackett_luce(
    h: Float[Tensor, " responses"], scores: Float[Tensor, " responses"], group: Int[Tensor, " responses"], beta: float
) -> Float[Tensor, " responses"]:
    """-log of the probability of a ranking, chosen from the best downwards; one term for every response that is chosen.

    term_i = -beta h_i + logsumexp_{j in C_i} beta h_j, C_i = i and all responses of its group that are ranked lower. The last
    one's term is 0, and tied ones never compete. Two responses: DPO. Source: Rafailov et al. 2023, appendix A.3.
    d of h_k, over the sum of terms: -beta (1 - sum_{i: k in C_i} softmax_{C_i}(beta h)_k).
    """
    lower = (group[:, None] == group[None, :]) & (scores[:, None] > scores[None, :])
    competes = lower | torch.eye(len(h), dtype=torch.bool)
    return torch.logsumexp((beta * h)[None, :].masked_fill(~competes, float("-inf")), dim=1) - beta * h


def wpo_weights(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """w(y_w) w(y_l), w(y) = exp(l), l the mean log-probability per token: how probable the policy finds the pair itself.

    chosen, rejected: l. Multiplies a pair's loss, without gradient, so that pairs count as if the policy had sampled them.
    Source: Zhou et al. 2024, eq. 4, without the alignment of weights to those of sampled tokens.
    """
    return torch.exp(chosen + rejected).detach()


def desensitised_weights(position: Int[Tensor, " tokens"], public: Int[Tensor, " tokens"], alpha: float) -> Float[Tensor, " tokens"]:
    """1 for tokens within the public length min(|y_w|, |y_l|) of the pair, alpha beyond it.

    position: which of the response's own tokens it is, from 0. public: that length, for every token. alpha = 1 is DPO, 0 looks
    at as many tokens of both. Source: LD-DPO (Liu et al. 2024, eq. 10).
    """
    return torch.where(position < public, 1.0, torch.tensor(alpha, dtype=torch.float64))
