"""The fused head: values and gradients by finite differences, in every variation of the head."""

from __future__ import annotations

import pytest
import torch

from trimtab.maths.logprobs import Head, token_logprobs


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("temperature", "scale"), [(1.0, 1.0), (0.7, 1.0), (1.3, 0.25)])
@pytest.mark.parametrize("entropy", [False, True])
def test_gradients_by_finite_differences(softcap: float | None, temperature: float, scale: float, entropy: bool) -> None:
    generator = torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in ((5, 4), (9, 4)))
    bias = torch.randn(9, dtype=torch.float64, generator=generator).requires_grad_()
    targets = torch.tensor([0, 8, 3, 3, 5])

    def compute(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        logprobs, entropies = token_logprobs(h, Head(w, b, scale, softcap), targets, temperature=temperature, entropy=entropy)
        return logprobs if entropies is None else torch.stack([logprobs, entropies])

    assert torch.autograd.gradcheck(
        compute, (hidden, weight, bias), nondet_tol=1e-12
    )  # a second backward pass computes again what the first kept


def test_values_are_log_softmax_and_entropy() -> None:
    generator = torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((6, 4), (11, 4)))
    targets = torch.arange(6)
    logprobs, entropies = token_logprobs(hidden, Head(weight, softcap=3.0), targets, temperature=0.5, entropy=True)
    log_p = torch.log_softmax(3 * torch.tanh(hidden @ weight.t() / 3) / 0.5, -1)
    assert torch.allclose(logprobs, log_p.gather(1, targets[:, None])[:, 0], atol=1e-12)
    assert entropies is not None
    assert torch.allclose(entropies, -(log_p.exp() * log_p).sum(-1), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    hidden, weight = torch.zeros(0, 32, dtype=dtype, requires_grad=True), torch.ones(64, 32, dtype=dtype, requires_grad=True)
    logprobs, entropies = token_logprobs(hidden, Head(weight), torch.zeros(0, dtype=torch.long), entropy=True)
    logprobs.sum().backward()
    assert logprobs.shape == (0,)
    assert entropies is not None
    assert entropies.shape == (0,)
    assert weight.grad is not None
    assert not weight.grad.any()
