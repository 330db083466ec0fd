"""Log-probabilities and entropies of given tokens, computed with the language-model head in chunks.

A [tokens, vocabulary] array of float32 is the largest thing in small-model training. Here it never exists: logits are made
in the model's own precision for some rows at a time (large matrix products), read in float32 for a few rows at a time (which
stay in the processor's cache), and only the log-probability of the token that was chosen is kept.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab import kernels
from trimtab.kernels import head as kernel
from trimtab.kernels import products

PART_BYTES = 2**28
"""Logits held at once in the model's precision. A batch that fits keeps them for the backward pass; a larger one recomputes."""

SLICE_ELEMENTS = 2**19
"""Logits read at once in full precision (2^19 float32 = 2 MiB)."""


@dataclass(frozen=True)
class Head:
    """A language-model head: logits = cap(scale * (h W^T + b)) / temperature, cap(z) = softcap * tanh(z / softcap).

    scale and softcap are properties of the model (Cohere and Granite scale, Gemma 2 and 3 cap); temperature is the policy's:
    it divides the logits everywhere, in sampling and in training alike.
    """

    weight: Float[Tensor, "vocabulary width"]
    bias: Float[Tensor, " vocabulary"] | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Float[Tensor, "rows width"], temperature: float = 1.0) -> Float[Tensor, "rows vocabulary"]:
        """Logits in float32 (float64 if the model is), without gradient bookkeeping beyond torch's own."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return self.finish(z, temperature)

    def detached(self) -> Head:
        """The same head without gradient."""
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())

    def finish(self, z: Tensor, temperature: float) -> Tensor:
        z = z if z.dtype == torch.float64 else z.float()
        if self.softcap is not None:
            return torch.tanh(z * (self.scale / self.softcap)) * (self.softcap / temperature)
        return z * (self.scale / temperature) if self.scale != temperature else z

    def slope(self, logits: Tensor, temperature: float) -> Tensor | float:
        """d logits / d z, from the finished logits."""
        if self.softcap is not None:
            return (1 - (logits * (temperature / self.softcap)) ** 2) * (self.scale / temperature)
        return self.scale / temperature


def token_logprobs(
    hidden: Float[Tensor, "tokens width"],
    head: Head,
    targets: Int[Tensor, " tokens"],
    *,
    temperature: float = 1.0,
    entropy: bool = False,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"] | None]:
    """log softmax(z)[y] for every row, and optionally the entropy H = -sum_v p_v log p_v (nats).

    Gradients flow to `hidden`, the head's weight and bias, through both outputs:

        d log p_y / d z_v = 1[v = y] - p_v          d H / d z_v = -p_v (log p_v + H)
    """
    logprobs, entropies = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, head, temperature, entropy)  # type: ignore[no-untyped-call]
    return logprobs, entropies if entropy else None


class _TokenLogprobs(torch.autograd.Function):
    """Where all logits are made at once and there is no cap, what is kept for the backward pass are the weights w = exp(z - max z),

    written over them, and their sums: the gradient is then -w times a number of the row, and no exponential is taken twice. A weight
    that carries `main_grad` (see training.optimiser) has its gradient added there, and autograd hears of none."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head, temperature: float, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        exact, hidden = torch.float64 if hidden.dtype == torch.float64 else torch.float32, hidden.contiguous()
        logprobs, norm, entropies, share = (torch.zeros(len(hidden), dtype=exact, device=hidden.device) for _ in range(4))
        parts = _parts(hidden, weight)
        keep = len(parts) == 1 and any(ctx.needs_input_grad[:3]) and head.softcap is None
        ctx.kept = None
        for part in parts:
            z, memory = _logits(hidden[part], weight, bias)
            compiled = head.softcap is None and kernels.serves(z)
            if compiled:
                into = logprobs[part], norm[part], entropies[part] if entropy else None, share[part] if keep else None
                kernel.forward(z, targets[part], head.scale / temperature, *into)
            for rows, inner in [] if compiled else _slices(part, z):
                logits = head.finish(z[inner], temperature)
                highest = logits.amax(-1, keepdim=True)
                below = logits - highest
                weights = torch.exp(below)
                total = weights.sum(-1, keepdim=True)
                norm[rows] = (highest + total.log())[:, 0]
                logprobs[rows] = logits.gather(1, targets[rows, None])[:, 0] - norm[rows]
                if keep:
                    z[inner], share[rows] = weights, 1 / total[:, 0]
                if entropy:  # log sum_v w_v - sum_v p_v log w_v with w = exp(z - max z)
                    mean = below.mul_(weights).nan_to_num_(nan=0.0).sum(-1) / total[:, 0]
                    entropies[rows] = total.log()[:, 0] - mean
            if keep:
                ctx.kept = z, memory
            else:
                _SPARE.append(memory)
        ctx.sink = getattr(weight, "main_grad", None)
        ctx.save_for_backward(hidden, weight, bias, targets, norm, logprobs, entropies, share)
        ctx.head, ctx.temperature = head, temperature
        ctx.set_materialize_grads(False)  # an output from which nothing is learnt costs nothing in the backward pass
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, norm, logprobs, entropies, share = ctx.saved_tensors
        grad_logprob, grad_entropy = torch.zeros_like(norm) if grads[0] is None else grads[0], grads[1]
        kept, ctx.kept = ctx.kept, None  # the gradient is written over it: a second backward pass computes it again
        head, temperature = ctx.head, ctx.temperature
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        grad_bias = torch.zeros(len(weight), dtype=norm.dtype, device=weight.device) if need_bias else None
        for part in _parts(hidden, weight):
            z, memory = kept if kept is not None else _logits(hidden[part], weight, bias)
            compiled = kept is not None and grad_entropy is None and kernels.serves(z)
            if compiled:
                kernel.backward(z, targets[part], logprobs[part], share[part], grad_logprob[part], head.scale / temperature)
            for rows, inner in [] if compiled else _slices(part, z):
                target, pull = targets[rows, None], grad_logprob[rows, None]
                if kept is None:
                    logits = head.finish(z[inner], temperature)
                    slope = head.slope(logits, temperature)
                    p = torch.exp(logits - norm[rows, None])
                else:
                    slope = head.scale / temperature
                    p = z[inner].to(norm.dtype).mul_(share[rows, None])
                chosen = logprobs[rows, None].exp()  # exactly: where it is near 1, 1 - p would be lost to rounding
                if grad_entropy is None:
                    grad = p.mul_(-pull).scatter_(1, target, (1 - chosen) * pull)
                else:  # -g_l p - g_H p (log p + H): both share the factor p
                    surprise = p.log().add_(entropies[rows, None]).mul_(grad_entropy[rows, None]).add_(pull)
                    grad = p.mul_(surprise).nan_to_num_(nan=0.0).neg_()
                    grad.scatter_add_(1, target, pull.to(grad.dtype))
                z[inner] = grad.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[part] = products.input_gradient([z], [weight]) if products.usable(weight) else z @ weight
            if need_weight and ctx.sink is not None and products.usable(weight):
                products.add_weight_gradients([z], hidden[part], [ctx.sink])
            elif need_weight and ctx.sink is not None:
                for words in range(0, len(weight), _WORDS):
                    ctx.sink[words : words + _WORDS] += z[:, words : words + _WORDS].t() @ hidden[part]
            elif need_weight:
                share = z.t() @ hidden[part]
                grad_weight = share if grad_weight is None else grad_weight.to(norm.dtype).add_(share)
            if grad_bias is not None:
                grad_bias += z.sum(0, dtype=norm.dtype)
            _SPARE.append(memory)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            None,
            None,
            None,
            None,
        )


_SPARE: deque[Tensor] = deque(maxlen=1)
"""Memory of logits that were done with: the next are written there, because fresh memory is ten times slower than warm."""

_WORDS = 2**13
"""Rows of the head's gradient made at once."""


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """h W^T + b, and the memory it lies in."""
    size = len(hidden) * len(weight)
    try:
        memory = _SPARE.pop()
    except IndexError:
        memory = hidden.new_empty(0)
    if memory.numel() < size or (memory.dtype, memory.device) != (hidden.dtype, hidden.device):
        memory = hidden.new_empty(size)
    z = memory[:size].view(len(hidden), len(weight))
    if products.usable(weight):
        products.forward(hidden, [weight], [bias], [z])
        return z, memory
    product = torch.mm(hidden, weight.t(), out=z) if bias is None else torch.addmm(bias, hidden, weight.t(), out=z)
    return product, memory


def rows_per_part(hidden: Tensor, weight: Tensor) -> int:
    """How many rows of logits fit in PART_BYTES in the model's precision."""
    return max(1, PART_BYTES // (len(weight) * hidden.element_size()))


def _parts(hidden: Tensor, weight: Tensor) -> list[slice]:
    """Rows whose logits are made by one matrix product."""
    size = rows_per_part(hidden, weight)
    return [slice(start, min(start + size, len(hidden))) for start in range(0, len(hidden), size)]


def _slices(part: slice, z: Tensor) -> list[tuple[slice, slice]]:
    """Rows of a part that are read together: (their place in the batch, their place in the part)."""
    size = max(1, SLICE_ELEMENTS // z.shape[1])
    spans = [(start, min(start + size, len(z))) for start in range(0, len(z), size)]
    return [(slice(part.start + a, part.start + b), slice(a, b)) for a, b in spans]
