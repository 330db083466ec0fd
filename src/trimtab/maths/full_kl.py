"""KL(pi || pi_ref) over the whole vocabulary at every prefix, with its gradient, computed in chunks of the vocabulary head."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.maths.logprobs import Head, rows_per_part


def full_kl(
    hidden: Float[Tensor, "tokens width"],
    head: Head,
    hidden_ref: Float[Tensor, "tokens width_ref"],
    head_ref: Head,
    temperature: float = 1.0,
) -> Float[Tensor, " tokens"]:
    """KL_t = sum_v p_v (log p_v - log q_v), p = pi(. | s_t), q = pi_ref(. | s_t), in nats.

    Gradients flow to `hidden` and `head` only:  d KL / d z_v = p_v (log p_v - log q_v - KL).
    As a loss it is not the gradient of the sequence KL: it misses what a token does to later prefixes (see maths.kl).
    """
    return _FullKL.apply(hidden, head.weight, head.bias, head, hidden_ref.detach(), head_ref, temperature)  # type: ignore[no-any-return, no-untyped-call]


class _FullKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, hidden_ref: Tensor, head_ref: Head, temperature: float
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, hidden_ref)
        ctx.head, ctx.head_ref, ctx.temperature = head, head_ref, temperature
        parts = [_log_p_and_difference(hidden[rows], head, hidden_ref[rows], head_ref, temperature) for rows in _rows(hidden, weight)]
        return torch.cat([_expectation(log_p, difference) for log_p, difference, _ in parts]) if parts else hidden.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, hidden_ref = ctx.saved_tensors
        grad_hidden, grad_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias)
        for rows in _rows(hidden, weight):
            log_p, difference, logits = _log_p_and_difference(hidden[rows], ctx.head, hidden_ref[rows], ctx.head_ref, ctx.temperature)
            centred = difference - _expectation(log_p, difference)[:, None]
            grad = (log_p.exp() * centred).nan_to_num_(nan=0.0) * grads[0][rows, None] * ctx.head.slope(logits, ctx.temperature)
            grad = grad.to(weight.dtype)
            grad_hidden[rows] = grad @ weight
            grad_weight += grad.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None


def _log_p_and_difference(hidden: Tensor, head: Head, hidden_ref: Tensor, head_ref: Head, temperature: float) -> tuple[Tensor, ...]:
    logits = head.logits(hidden, temperature)
    log_p = torch.log_softmax(logits, dim=-1)
    return log_p, log_p - torch.log_softmax(head_ref.logits(hidden_ref, temperature), dim=-1), logits


def _expectation(log_p: Tensor, x: Tensor) -> Tensor:
    """sum_v p_v x_v, where 0 times anything is 0."""
    return (log_p.exp() * x).nan_to_num(nan=0.0).sum(-1)


def _rows(hidden: Tensor, weight: Tensor) -> list[slice]:
    size = max(1, rows_per_part(hidden, weight) // 8)  # several float32 copies of the logits live at once
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]
