"""Log-probabilities and entropies of given tokens, computed with the language-model head in chunks.

A [tokens, vocabulary] array of float32 is the largest thing in small-model training. Here it never exists: where there are kernels, logits
are summed up while they are made, and elsewhere made in the model's own precision for some rows at a time (large matrix products) and read
in float32 for a few rows at a time (which stay in the processor's cache). What is kept, and only to learn from, is exp(logits) in the
model's precision.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    settings = (head, temperature, entropy, torch.is_grad_enabled())
    logprobs, entropies = _TokenLogprobs.apply(hidden, head.weight, head.bias, targets, *settings)  # type: ignore[no-untyped-call]
    return logprobs, entropies if entropy else None


class _Sums(NamedTuple):
    """Of every row, with logits l and weights w_v = exp(l_v - shift): l_target - shift, sum_v w_v and, where wanted, sum_v w_v log w_v."""

    shift: Float[Tensor, " rows"]
    chosen: Float[Tensor, " rows"]
    total: Float[Tensor, " rows"]
    mean: Float[Tensor, " rows"]


class _TokenLogprobs(torch.autograd.Function):
    """Where all logits are made at once and there is no cap, the weights w = exp(l - shift) are kept for the backward pass.

    With the pull g on a log-probability, the gradient of its row of logits is -g / sum w times w, where -(1 - p) sum w stands for the
    target's weight. So the kept weights serve as they are, and the number before them goes to the short rows: of the head's input, and of
    its gradient. A weight that carries `main_grad` (see training.optimiser) has its gradient added there, and autograd hears of none."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: Head,
        temperature: float,
        entropy: bool,
        learning: bool,  # ctx.needs_input_grad tells what is trainable, also where nothing is learnt
    ) -> tuple[Tensor, Tensor]:
        hidden, parts = hidden.contiguous(), _parts(hidden, weight)
        keep = len(parts) == 1 and learning and any(ctx.needs_input_grad[:3]) and head.softcap is None
        read = [_weighed(hidden[part], head, targets[part], temperature, entropy, keep) for part in parts]
        sums = _Sums._make(torch.cat(values) for values in zip(*(sums for sums, _ in read), strict=True))
        log_total = sums.total.log()
        logprobs, norm, entropies = sums.chosen - log_total, sums.shift + log_total, log_total - sums.mean / sums.total
        ctx.kept = read[0][1] if keep else None
        ctx.sink = getattr(weight, "main_grad", None)
        ctx.save_for_backward(hidden, weight, bias, targets, norm, logprobs, entropies, sums.total)
        ctx.head, ctx.temperature = head, temperature
        ctx.set_materialize_grads(False)  # an output from which nothing is learnt costs nothing in the backward pass
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, targets, norm, logprobs, entropies, total = ctx.saved_tensors
        grad_logprob, grad_entropy = torch.zeros_like(norm) if grads[0] is None else grads[0], grads[1]
        kept, ctx.kept = ctx.kept, None  # gradients are written over it: a second backward pass computes it again
        head, temperature = ctx.head, ctx.temperature
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = None
        grad_bias = torch.zeros(len(weight), dtype=norm.dtype, device=weight.device) if need_bias else None
        for part in _parts(hidden, weight):
            x, target, pull, logprob, total_of = hidden[part], targets[part], grad_logprob[part], logprobs[part], total[part]
            if kept is not None:
                z, memory = kept
            elif head.softcap is None:
                _, (z, memory) = _weighed(x, head, target, temperature, False, True, norm[part])
                total_of = torch.ones_like(total_of)
            else:
                z, memory = _logits(x, weight, bias)
            factor = None
            if head.softcap is None and grad_entropy is None:
                factor = (pull * (-head.scale / temperature) / total_of)[:, None]
                z[torch.arange(len(z), device=z.device), target] = (total_of * logprob.expm1()).to(z.dtype)
                x = (x * factor).to(x.dtype)
            for rows in _slices(z) if factor is None else []:
                if head.softcap is None:
                    slope: Tensor | float = head.scale / temperature
                    p = z[rows].to(norm.dtype).div_(total_of[rows, None])
                else:
                    logits = head.finish(z[rows], temperature)
                    slope = head.slope(logits, temperature)
                    p = torch.exp(logits - norm[part][rows, None])
                here, of = pull[rows, None], target[rows, None]
                if grad_entropy is None:  # expm1: where p is near 1, 1 - p would be lost to rounding
                    grad = p.mul_(-here).scatter_(1, of, -logprob[rows, None].expm1() * here)
                else:  # -g_l p - g_H p (log p + H): both share the factor p
                    surprise = p.log().add_(entropies[part][rows, None]).mul_(grad_entropy[part][rows, None]).add_(here)
                    grad = p.mul_(surprise).nan_to_num_(nan=0.0).neg_()
                    grad.scatter_add_(1, of, here.to(grad.dtype))
                z[rows] = grad.mul_(slope)
            if grad_hidden is not None:
                found = products.input_gradient([z], [weight]) if products.usable(weight) else z @ weight
                grad_hidden[part] = found if factor is None else found * factor
            if need_weight and ctx.sink is not None and products.usable(weight):
                products.add_weight_gradients([z], x, [ctx.sink])
            elif need_weight and ctx.sink is not None:
                for words in range(0, len(weight), _WORDS):
                    ctx.sink[words : words + _WORDS] += z[:, words : words + _WORDS].t() @ x
            elif need_weight:
                share = z.t() @ x
                grad_weight = share if grad_weight is None else grad_weight.to(norm.dtype).add_(share)
            for rows in _slices(z) if grad_bias is not None else []:
                grad_bias += (z[rows] if factor is None else z[rows] * factor[rows]).sum(0, dtype=norm.dtype)
            _SPARE.append(memory)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(weight.dtype),
            *[None] * 5,
        )


_LARGEST = 1e26
"""Sums of weights above it lose what is small: their rows are read again, with another shift."""

_SPARE: deque[Tensor] = deque(maxlen=1)
"""Memory of logits that were done with: the next are written there, because fresh memory is ten times slower than warm."""

_WORDS = 2**13
"""Rows of the head's gradient made at once."""


def _weighed(
    hidden: Float[Tensor, "rows width"],
    head: Head,
    targets: Int[Tensor, " rows"],
    temperature: float,
    mean: bool,
    keep: bool,
    shift: Float[Tensor, " rows"] | None = None,
) -> tuple[_Sums, tuple[Tensor, Tensor]]:
    """What is read of every row, and its weights and the memory they lie in; without `keep` there are none."""
    if head.softcap is None and products.usable(head.weight):
        return _weighed_at_once(hidden, head, targets, head.scale / temperature, mean, keep, shift)
    z, memory = _logits(hidden, head.weight, head.bias)
    exact = torch.float64 if z.dtype == torch.float64 else torch.float32
    sums = _Sums._make(torch.zeros(len(z), dtype=exact, device=z.device) for _ in _Sums._fields)
    compiled = head.softcap is None and kernels.serves(z)
    if compiled:
        scale = head.scale / temperature
        sums.shift[:] = z.amax(-1).float() * scale if shift is None else shift
        sums.chosen[:] = z.gather(1, targets[:, None])[:, 0].float() * scale - sums.shift
        kernel.of_logits(z, scale, sums.shift, keep, sums.total, sums.mean if mean else None)
    for rows in [] if compiled else _slices(z):
        logits = head.finish(z[rows], temperature)
        sums.shift[rows] = logits.amax(-1) if shift is None else shift[rows]
        below = logits - sums.shift[rows, None]
        weights = torch.exp(below)
        sums.chosen[rows], sums.total[rows] = below.gather(1, targets[rows, None])[:, 0], weights.sum(-1)
        if keep:
            z[rows] = weights
        if mean:
            sums.mean[rows] = below.mul_(weights).nan_to_num_(nan=0.0).sum(-1)
    if not keep:
        _SPARE.append(memory)
    return sums, (z, memory)


def _weighed_at_once(
    hidden: Tensor, head: Head, targets: Tensor, scale: float, mean: bool, keep: bool, shift: Tensor | None
) -> tuple[_Sums, tuple[Tensor, Tensor]]:
    """The same without logits that are written down. What is near to the logit of the target serves as the shift."""
    given = shift is not None
    if shift is None:
        shift = (hidden * head.weight[targets]).sum(-1, dtype=torch.float32)
        shift = (shift if head.bias is None else shift + head.bias[targets]) * scale
    z, memory = _room(hidden, head.weight) if keep else (hidden.new_empty(0), hidden.new_empty(0))
    sums = _Sums(shift, *(torch.zeros_like(shift) for _ in range(3)))
    into = (sums.chosen, sums.total, sums.mean if mean else None, z if keep else None)
    kernel.of_rows(hidden, head.weight, head.bias, targets, scale, shift, *into)
    lost = (~(sums.total < _LARGEST)).nonzero()[:, 0]
    if len(lost) and not given:  # the target is so unlikely: the highest logit serves
        rows = hidden[lost]
        highest = torch.nn.functional.linear(rows, head.weight, head.bias).amax(-1).float() * scale
        again, (weights, _) = _weighed_at_once(rows, head, targets[lost], scale, mean, keep, highest)
        for values, found in zip(sums, again, strict=True):
            values[lost] = found
        if keep:
            z[lost] = weights
    return sums, (z, memory)


def _room(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, vocabulary] that was used before, and the memory it lies in."""
    size = len(hidden) * len(weight)
    try:
        memory = _SPARE.pop()
    except IndexError:
        memory = hidden.new_empty(0)
    if memory.numel() < size or (memory.dtype, memory.device) != (hidden.dtype, hidden.device):
        memory = hidden.new_empty(size)
    return memory[:size].view(len(hidden), len(weight)), memory


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """h W^T + b, and the memory it lies in."""
    z, memory = _room(hidden, weight)
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
    return [slice(start, min(start + size, len(hidden))) for start in range(0, max(1, len(hidden)), size)]


def _slices(z: Tensor) -> list[slice]:
    """Rows that are read together."""
    size = max(1, SLICE_ELEMENTS // z.shape[1])
    return [slice(start, min(start + size, len(z))) for start in range(0, len(z), size)]
