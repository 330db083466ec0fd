"""Best-of-n: draw n responses, keep the one with the highest reward. Exact on a finite set; estimates for sampled responses.

Write F(y) = P(r(Y) <= r(y)) and F^-(y) = P(r(Y) < r(y)) for Y ~ pi. The best of n has a reward of at most r(y) with probability
F(y)^n, and ties are decided by the order of the draw, that is in proportion to pi, so

    pi_n(y) = [F(y)^n - F^-(y)^n] pi(y) / [F(y) - F^-(y)].

Whole responses of one prompt are numbered along `responses`; `logprobs` are log pi of whole responses. What depends on the
reward depends on its order alone. Sources: Stiennon et al. 2020; Beirami et al. 2024 (arXiv 2401.01879).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def best_of_n_logprobs(logprobs: Float[Tensor, " responses"], rewards: Float[Tensor, " responses"], n: int) -> Float[Tensor, " responses"]:
    """log pi_n of every response; `logprobs` are normalised first. n = 1 gives log pi."""
    _check(n)
    logprobs, mass, below, inverse = _tie_classes(logprobs, rewards)
    upto = below + mass
    # log(F^n - F^-^n) = n log F + log(1 - (F^- / F)^n), and F^- / F = 1 - mass / F: no difference of nearly equal numbers
    log_smaller = n * torch.log1p(-(mass / upto).clamp(max=1.0))
    log_won = n * upto.log() + torch.log(-torch.expm1(log_smaller))
    return logprobs + (log_won - mass.log())[inverse]


def kl_divergence(logprobs: Float[Tensor, " responses"], rewards: Float[Tensor, " responses"], n: int) -> Float[Tensor, ""]:
    """KL(pi_n || pi) = sum_y pi_n(y) log(pi_n(y) / pi(y)) in nats, exactly. Never above `kl_bound`; 0 when all rewards are equal."""
    best = best_of_n_logprobs(logprobs, rewards, n)
    gain = best - torch.log_softmax(logprobs.double(), dim=0)
    return torch.where(best > -math.inf, best.exp() * gain, 0.0).sum()


def kl_bound(n: int) -> float:
    """log n - (n - 1) / n: KL(pi_n || pi) where no two responses tie and none has any mass, else an upper bound of it.

    Source: Stiennon et al. 2020; that it is a bound and no equality: Beirami et al. 2024.
    """
    _check(n)
    return math.log(n) - (n - 1) / n


def kl_estimate(logprobs: Float[Tensor, "*selected"], n: int) -> Float[Tensor, "*selected"]:
    """An estimate of KL(pi_n || pi) from log pi of each response that best-of-n selected; average it over draws and prompts.

        (1 - e)^n [log n + (n - 1) log(1 - e) - (n - 1) / n]  +  [1 - (1 - e)^n] log([1 - (1 - e)^n] / e),      e = pi(y)

    This is the exact KL where the best response has mass e and all the others together are continuous. It tends to
    `kl_bound` for e -> 0 (long sampled responses) and is 0 for e = 1 (a prompt with one certain answer).

    What its mean over y ~ pi_n estimates: a number never below KL(pi_n || pi) and never above `kl_bound`. For write D(a, b) for
    what an atom between the quantiles a < b takes off the bound, so that KL = bound - sum D(F^-(y), F(y)). Then
    D(b - e, b) = b^n D(1 - e / b, 1) >= pi_n(y) D(1 - e, 1), and the right side is what the estimate takes off; ties of different
    responses take off more, not less. With top-p or top-k, log pi of the whole policy understates e: again towards the bound.

    Source: Beirami et al. 2024.
    """
    _check(n)
    log_e = logprobs.double().clamp(max=0.0)
    log_rest = torch.log(-torch.expm1(log_e))  # log(1 - e); -inf for e = 1
    log_not = n * log_rest
    won = -torch.expm1(log_not)
    others = torch.where(log_rest > -math.inf, log_not.exp() * (math.log(n) + (n - 1) * log_rest - (n - 1) / n), 0.0)
    # -> n as e -> 0, also where e is too small for a float
    log_gain = torch.where(log_e > -36.0, won.clamp(min=1e-300).log() - log_e, math.log(n))
    return others + won * log_gain


def win_rate(logprobs: Float[Tensor, " responses"], rewards: Float[Tensor, " responses"], n: int) -> Float[Tensor, ""]:
    """P(r(Y_n) > r(Y)) + P(r(Y_n) = r(Y)) / 2 for Y_n ~ pi_n, Y ~ pi: n / (n + 1) without ties, less with them.

    Source: Beirami et al. 2024.
    """
    best = best_of_n_logprobs(logprobs, rewards, n).exp()
    _, mass, below, inverse = _tie_classes(logprobs, rewards)
    return (best * (below + mass / 2)[inverse]).sum()


def expected_gold(proxy: Float[Tensor, " samples"], gold: Float[Tensor, " samples"], n: int) -> Float[Tensor, ""]:
    """The gold reward of the best of n by the proxy, from N >= n samples of one prompt: unbiased, and all N are used.

        sum_i  C(i - 1, n - 1) / C(N, n)  gold(y_(i)),      y_(1), ..., y_(N) sorted by the proxy

    the mean over all subsets of n samples. Samples that tie in the proxy share their gold rewards evenly. With gold = proxy
    it is the proxy's own best-of-n curve. Source: Nakano et al. 2021 (WebGPT). Raises ValueError for N < n.
    """
    _check(n)
    total = len(proxy)
    if total < n:
        raise ValueError(f"the best of {n} cannot be estimated from {total} samples")
    _, inverse, sizes = torch.unique(proxy, return_inverse=True, return_counts=True)  # sorted
    shared = torch.zeros(len(sizes), dtype=torch.float64).index_add(0, inverse, gold.double()) / sizes
    upto = sizes.cumsum(0)
    # C(k, n) / C(N, n) = prod_j (k - j) / (N - j): the chance that the best of n is among the lowest k
    steps = torch.arange(n, dtype=torch.float64)
    among = ((upto[:, None] - steps).clamp(min=0) / (total - steps)).prod(dim=1)
    chance = torch.diff(among, prepend=among.new_zeros(1))
    return torch.dot(chance, shared)


def _tie_classes(logprobs: Tensor, rewards: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Normalised log pi; by reward, rising: the mass of each tie class and the mass below it; the class of every response."""
    logprobs = torch.log_softmax(logprobs.double(), dim=0)
    values, inverse = torch.unique(rewards, return_inverse=True)
    mass = torch.zeros(len(values), dtype=torch.float64).index_add(0, inverse, logprobs.exp())
    upto = mass.cumsum(0)
    return logprobs, mass / upto[-1], (upto - mass) / upto[-1], inverse


def _check(n: int) -> None:
    if n < 1:
        raise ValueError(f"the best of {n} responses is not defined")
