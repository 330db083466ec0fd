"""Attention over a packed batch: a compiled kernel on CPUs that have one (`kernels.attention`), FlexAttention on GPUs (`models.flex`), else
batched matrix products on small padded blocks, with a backward pass of their own.

A block holds a few groups of similar size side by side. Its prompts attend causally to themselves; its responses, cut into parts of
similar length, attend to their prompt and causally to themselves. A response's queries against the prompt's keys are one product
for all responses of a group, and no key is ever copied for the query heads that share it.

No score outlives its block: the backward pass makes the softmax again, a few milliseconds of matrix products against gigabytes of
memory. Long prompts and responses are taken a few query rows at a time, which also skips keys that lie in the future.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from trimtab.kernels import attention as fused
from trimtab.kernels.attention import Sequences
from trimtab.models import flex
from trimtab.models.blocks import Block, Span, blocks_of

QUERY_TOKENS = 256
"""Tokens of one sequence whose queries are taken at once."""

SCORES = 2**23
"""Attention scores held at once, unless a single sequence's share is larger."""


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer asks of its attention: score scale, sliding window (None: unlimited), tanh soft cap of the scores."""

    scale: float
    window: int | None
    softcap: float | None


@dataclass
class Plan:
    """The groups of a packed sequence of n tokens, made ready for attention; a layer finds what an earlier one has made.

    In `blocks` a row is a token and a key head; the rows of all blocks follow each other, [g, kv, P] and then every [g, kv, S, R].
    """

    spans: list[Span]
    tokens: int
    device: torch.device | str = "cpu"
    orders: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[Any, Tensor] = field(default_factory=dict)

    @cached_property
    def blocks(self) -> list[Block]:
        return blocks_of(self.spans, self.device)

    @cached_property
    def sequences(self) -> Sequences:
        return Sequences.of(self.spans)

    @cached_property
    def sights(self) -> flex.Sights:
        return flex.Sights.of(self.spans, self.tokens, self.device)

    def order(self, kv: int) -> tuple[Tensor, Tensor, Tensor]:
        """For a number of key heads: `rows`, where each row is in the packed [n * kv]; `back`, the inverse; and the rows of padding."""
        if kv not in self.orders:
            flat = []
            for block in self.blocks:
                for places in (block.prompts, *block.parts):
                    head = torch.arange(kv, device=places.device).view(1, kv, *[1] * (places.dim() - 1))
                    flat.append(torch.where(places.unsqueeze(1) < 0, -1, places.unsqueeze(1) * kv + head).flatten())
            rows = torch.cat(flat)
            real = rows >= 0
            back = torch.empty(self.tokens * kv, dtype=torch.long, device=rows.device)
            back[rows[real]] = real.nonzero()[:, 0]
            self.orders[kv] = rows.clamp(min=0), back, (~real).nonzero()[:, 0]
        return self.orders[kv]

    def causal(self, queries: range, rep: int, window: int | None, like: Tensor) -> Tensor:
        """Additive mask [queries * rep, keys up to the last query] of the tokens of a sequence on themselves."""
        name = queries, rep, window, like.dtype
        if name not in self.masks:
            q = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
            k = torch.arange(queries.stop, device=like.device)
            hidden = (k > q) if window is None else (k > q) | (q - k >= window)
            self.masks[name] = _additive(hidden, like).repeat_interleave(rep, 0)
        return self.masks[name]

    def to_prompts(self, block: Block, kv: int, shape: tuple[int, range, int], window: int | None, like: Tensor) -> Tensor | None:
        """Additive mask [g * kv, rows or 1, P] of (S, queries, rep) on the prompts' padding and on what has left the window."""
        prompts = block.prompts
        lengths = (prompts >= 0).sum(1)
        hidden = (prompts < 0)[:, None]
        if window is not None:
            responses, queries, rep = shape
            q = torch.arange(queries.start, queries.stop, device=like.device)[:, None]
            left = lengths[:, None, None] + q - torch.arange(prompts.shape[1], device=like.device) >= window
            hidden = (hidden | left).repeat_interleave(rep, 1).repeat(1, responses, 1)
        return _additive(hidden, like).repeat_interleave(kv, 0) if bool(hidden.any()) else None


def _additive(hidden: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(hidden.shape, dtype=like.dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


def attention(
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    plan: Plan,
    settings: AttentionSettings,
) -> Float[Tensor, "n heads dim"]:
    """softmax(scale q k^T + mask) v for every token of a packed sequence.

    With W = softmax(S), O = W V:  dV = W^T dO,  dS = W * (dO V^T - rowsum(W * dO V^T)),  dQ = scale dS K,  dK = scale dS^T Q.
    """
    if fused.usable(query):
        return fused.attention(query, key, value, plan.sequences, settings.scale, settings.window, settings.softcap)
    if flex.usable(query) and flex.agrees(query, key.shape[1], settings.window, settings.softcap, partial(_by_products, settings=settings)):
        return flex.attention(query, key, value, plan.sights, settings.scale, settings.window, settings.softcap)
    return _Attention.apply(query, key, value, plan, settings)  # type: ignore[no-any-return, no-untyped-call]


def _by_products(query: Tensor, key: Tensor, value: Tensor, spans: list[Span], *, settings: AttentionSettings) -> Tensor:
    """What FlexAttention is held against, with the scale that it is held against it with."""
    usual = replace(settings, scale=query.shape[-1] ** -0.5)
    return _Attention.apply(query, key, value, Plan(spans, len(query), query.device), usual)  # type: ignore[no-any-return, no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: Plan, settings: AttentionSettings) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.settings = plan, settings
        kv = key.shape[1]
        rows, back, _ = plan.order(kv)
        q, k, v = (_gather(x, kv, rows) for x in (query, key, value))
        out = torch.empty_like(q)
        for sight in _sights(plan, kv, settings, (q, k, v, out)):
            sight.forward()
        return out.index_select(0, back).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        kv = key.shape[1]
        rows, back, padding = ctx.plan.order(kv)
        q, k, v = (_gather(x, kv, rows) for x in (query, key, value))
        grad = _gather(grads[0], kv, rows).index_fill_(0, padding, 0.0)
        into = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for sight in _sights(ctx.plan, kv, ctx.settings, (q, k, v, grad), into):
            sight.backward()
        found = (g.index_select(0, back).view(x.shape) for g, x in zip(into, (query, key, value), strict=True))
        return (*found, None, None)


def _gather(x: Tensor, kv: int, rows: Tensor) -> Tensor:
    """[n, heads, dim] -> the blocks' rows [rows, heads / kv * dim]."""
    return x.reshape(x.shape[0] * kv, -1).index_select(0, rows)


@dataclass
class _Seen:
    """Keys that some queries see, and what is added to them: keys, values [batch, keys, dim] with their gradients, and their mask."""

    mask: Tensor | None
    key: Tensor
    value: Tensor
    grad_key: Tensor | None
    grad_value: Tensor | None


@dataclass
class _Sight:
    """Some queries and all that they see: their own sequence's keys (a batch entry for each) and the prompt's (one for each group).

    query, grad_query [b, s, rows, dim] with b = groups x key heads, s sequences, rows = tokens x query heads of a key head;
    out: the same of what comes out, or in the backward pass of its gradient. An empty prompt is seen by nobody.
    """

    query: Tensor
    out: Tensor
    grad_query: Tensor | None
    own: _Seen
    prompt: _Seen | None
    settings: AttentionSettings

    def forward(self) -> None:
        b, s, r, dim = self.query.shape
        weights, _ = self._weights()
        own, cross = self._split(weights)
        if cross is None or self.prompt is None:
            result = torch.bmm(own, self.own.value)
        else:
            result = torch.bmm(cross, self.prompt.value).view(b * s, r, dim).baddbmm_(own, self.own.value)
        self.out.copy_(result.view(b, s, r, dim))

    def backward(self) -> None:
        assert self.grad_query is not None
        b, s, r, dim = self.query.shape
        weights, slope = self._weights()
        query, grad = (x.contiguous().view(b * s, r, dim) for x in (self.query, self.out))
        pull = torch.bmm(grad, self.own.value.transpose(1, 2))
        if self.prompt is not None:
            pull = torch.cat([torch.bmm(grad.view(b, s * r, dim), self.prompt.value.transpose(1, 2)), pull.view(b, s * r, -1)], -1)
        pull = torch._softmax_backward_data(pull, weights, -1, weights.dtype)
        pull = pull if slope is None else pull.mul_(slope)
        (own_pull, cross_pull), (own, cross) = self._split(pull), self._split(weights)
        result = self._give(self.own, own_pull, own, query, grad)
        if self.prompt is not None and cross_pull is not None and cross is not None:
            result += self._give(self.prompt, cross_pull, cross, query.view(b, s * r, dim), grad.view(b, s * r, dim)).view(b * s, r, dim)
        self.grad_query.copy_(result.view(b, s, r, dim))

    def _give(self, seen: _Seen, pull: Tensor, weights: Tensor, query: Tensor, grad: Tensor) -> Tensor:
        """Add to the gradients of keys and values; what they give to the queries."""
        assert seen.grad_key is not None
        assert seen.grad_value is not None
        seen.grad_value += torch.bmm(weights.transpose(1, 2), grad)
        seen.grad_key.add_(torch.bmm(pull.transpose(1, 2), query), alpha=self.settings.scale)
        return torch.bmm(pull, seen.key).mul_(self.settings.scale)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """What belongs to own keys [b * s, rows, keys], and to the prompt's [b, s * rows, P]."""
        if self.prompt is None:
            return x, None
        b, s, r, _ = self.query.shape
        p = self.prompt.key.shape[1]
        return x[..., p:].view(b * s, r, x.shape[-1] - p), x[..., :p]

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """The softmax over all keys, and d score / d (scaled product) where there is a soft cap."""
        b, s, r, dim = self.query.shape
        query = self.query.contiguous().view(b * s, r, dim)
        scores, slope = self._scores(query, self.own)
        if self.prompt is not None:
            cross, cross_slope = self._scores(query.view(b, s * r, dim), self.prompt)
            scores = torch.cat([cross, scores.view(b, s * r, -1)], -1)
            if cross_slope is not None and slope is not None:
                slope = torch.cat([cross_slope, slope.view(b, s * r, -1)], -1)
        return torch.softmax(scores, -1), slope

    def _scores(self, query: Tensor, seen: _Seen) -> tuple[Tensor, Tensor | None]:
        scale, cap, key = self.settings.scale, self.settings.softcap, seen.key.transpose(1, 2)
        if cap is None and seen.mask is not None:
            return torch.baddbmm(seen.mask, query, key, alpha=scale), None
        scores = torch.bmm(query, key).mul_(scale)
        if cap is None:
            return scores, None
        scores = scores.div_(cap).tanh_()
        slope = 1 - scores * scores
        scores = scores.mul_(cap)
        return scores if seen.mask is None else scores.add_(seen.mask), slope


Flat = tuple[Tensor, Tensor, Tensor, Tensor]
"""query, key, value and out (or its gradient) of all rows."""


def _sights(
    plan: Plan, kv: int, settings: AttentionSettings, flat: Flat, grads: tuple[Tensor, Tensor, Tensor] | None = None
) -> Iterator[_Sight]:
    """All queries, a few key heads and tokens at a time."""
    start, dim = 0, flat[1].shape[1]
    rep = flat[0].shape[1] // dim
    for block in plan.blocks:
        prompt: list[Any] = []
        for places in (block.prompts, *block.parts):
            if not places.numel():
                continue
            tokens, b = places.shape[-1], places.shape[0] * kv
            s = places[0].numel() // tokens
            rows = slice(start, start + places.numel() * kv)
            start = rows.stop
            q, k, v, out = (x[rows].view(b, s, -1, dim) for x in flat)
            gq, gk, gv = (None, None, None) if grads is None else (x[rows].view(b, s, -1, dim) for x in grads)
            width = tokens + (block.prompts.shape[1] if prompt else 0)
            for few in _spans(tokens, QUERY_TOKENS):
                part, queries = slice(few.start * rep, few.stop * rep), range(few.start, few.stop)
                own_mask = plan.causal(queries, rep, settings.window, q)
                prompt_mask = plan.to_prompts(block, kv, (s, queries, rep), settings.window, q) if prompt else None
                for some in _spans(b, SCORES // max(1, s * len(queries) * rep * width)):
                    own: list[Any] = [None if x is None else x[some, :, : few.stop].flatten(0, 1) for x in (k, v, gk, gv)]
                    theirs: list[Any] = [None if x is None else x[some] for x in prompt]
                    mask = prompt_mask if prompt_mask is None else prompt_mask[some]
                    yield _Sight(
                        q[some, :, part],
                        out[some, :, part],
                        None if gq is None else gq[some, :, part],
                        _Seen(own_mask, *own),
                        _Seen(mask, *theirs) if prompt else None,
                        settings,
                    )
            if s == 1 and places is block.prompts:
                prompt = [None if x is None else x[:, 0] for x in (k, v, gk, gv)]


def _spans(count: int, size: int) -> list[slice]:
    """Consecutive slices of at most `size` (at least one) of `count` places."""
    size = max(1, size)
    return [slice(a, min(a + size, count)) for a in range(0, count, size)]
