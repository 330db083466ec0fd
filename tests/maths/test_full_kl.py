"""The full KL per prefix: values and gradients against autograd through log_softmax, in every variation of the heads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.maths import logprobs
from trimtab.maths.full_kl import full_kl
from trimtab.maths.logprobs import Head

WORDS, WIDTH, TOKENS = 9, 4, 7


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(seed))


def plain(hidden: Tensor, head: Head, temperature: float) -> Tensor:
    """log softmax of the logits, written out."""
    bias = 0.0 if head.bias is None else head.bias
    z = head.scale * (hidden @ head.weight.t() + bias)
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    return torch.log_softmax(z / temperature, -1)


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.25)])
@pytest.mark.parametrize("biased", [False, True])
def test_value_and_gradient_are_autograds(
    monkeypatch: pytest.MonkeyPatch, rows_at_once: int, softcap: float | None, temperature: float, scale: float, biased: bool
) -> None:
    monkeypatch.setattr(logprobs, "PART_BYTES", 8 * rows_at_once * WORDS * 8)
    leaves = [draw(TOKENS, WIDTH, seed=0), draw(WORDS, WIDTH, seed=1), draw(WORDS, seed=2)]
    hidden, weight, bias = (x.requires_grad_() for x in leaves)
    head = Head(weight, bias if biased else None, scale, softcap)
    hidden_ref, head_ref = draw(TOKENS, 3, seed=3).requires_grad_(), Head(draw(WORDS, 3, seed=4).requires_grad_())
    found = full_kl(hidden, head, hidden_ref, head_ref, temperature)
    log_p, log_q = plain(hidden, head, temperature), plain(hidden_ref, head_ref, temperature).detach()
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(found, expected, atol=1e-12)
    inputs, weights = [hidden, weight, *([bias] if biased else [])], torch.arange(1.0, TOKENS + 1).double()
    ours = torch.autograd.grad((found * weights).sum(), inputs, retain_graph=True)
    theirs = torch.autograd.grad((expected * weights).sum(), inputs)
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, other, atol=1e-12)
    nothing = torch.autograd.grad(found.sum(), [hidden_ref, head_ref.weight], allow_unused=True)
    assert nothing == (None, None)  # the reference is never trained


@given(st.integers(0, 1000), st.floats(0.3, 3))
@settings(max_examples=30, deadline=None)
def test_closed_form_of_the_gradient_for_the_logits(seed: int, temperature: float) -> None:
    logits, reference = draw(TOKENS, WORDS, seed=seed).requires_grad_(), draw(TOKENS, WORDS, seed=seed + 1)
    identity = Head(torch.eye(WORDS, dtype=torch.float64))
    kl = full_kl(logits, identity, reference, identity, temperature)
    (gradient,) = torch.autograd.grad(kl.sum(), logits)
    log_p, log_q = (torch.log_softmax(x.detach() / temperature, -1) for x in (logits, reference))
    expected = log_p.exp() * (log_p - log_q - kl.detach()[:, None]) / temperature
    assert torch.allclose(gradient, expected, atol=1e-12)
    assert kl.min().item() >= 0
    assert float(gradient.sum(-1).abs().max()) < 1e-12  # what one logit gains the others lose


def test_equal_policies_have_kl_and_gradient_zero() -> None:
    hidden, head = draw(TOKENS, WIDTH, seed=0).requires_grad_(), Head(draw(WORDS, WIDTH, seed=1))
    kl = full_kl(hidden, head, hidden, head)
    assert kl.abs().max().item() < 1e-15
    assert float(torch.autograd.grad(kl.sum(), hidden)[0].abs().max()) < 1e-14


def test_tokens_that_neither_policy_gives_count_nothing() -> None:
    hidden, weight = draw(TOKENS, WIDTH, seed=0).requires_grad_(), draw(WORDS, WIDTH, seed=1)
    never = torch.zeros(WORDS, dtype=torch.float64)
    never[2] = -torch.inf
    rest, other = [i for i in range(WORDS) if i != 2], draw(WORDS, WIDTH, seed=5)
    with_it = full_kl(hidden, Head(weight, never), hidden.detach(), Head(other, never))
    without = full_kl(hidden, Head(weight[rest]), hidden.detach(), Head(other[rest]))
    assert torch.allclose(with_it, without, atol=1e-12)
    mine, theirs = (torch.autograd.grad(kl.sum(), hidden)[0] for kl in (with_it, without))
    assert torch.allclose(mine, theirs, atol=1e-12)


def test_no_tokens_no_kl() -> None:
    head = Head(draw(WORDS, WIDTH, seed=1))
    assert full_kl(draw(0, WIDTH, seed=0), head, draw(0, WIDTH, seed=0), head).shape == (0,)
