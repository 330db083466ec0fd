"""The packed shared-prompt forward pass: each prompt once, its responses behind it, no padding.

A batch is one sequence of N tokens,

    x1 y1,1 y1,2 ...  x2 y2,1 y2,2 ...

with position ids that restart every response right after its prompt. An attention function registered with
`transformers.AttentionInterface` reads a `layout=` keyword that travels through the model's own `forward` to every layer:
prompt tokens attend causally to their prompt, response tokens to their prompt and causally to themselves. Everything but
attention works token by token, so the result equals running each (prompt, response) sequence alone.

For attention only, groups of similar size are laid side by side in small padded blocks, so that it is a handful of batched
matrix products; a response's queries against their prompt's keys are one product for the whole group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab.errors import ModelError
from trimtab.types import Group

ATTENTION = "trimtab_packed"
"""The name of the attention function; models are loaded with `attn_implementation=ATTENTION`."""


@dataclass(frozen=True)
class AttentionSettings:
    """What a layer asks of its attention: score scale, sliding window (None: unlimited), tanh soft cap of the scores."""

    scale: float
    window: int | None
    softcap: float | None


class AttentionLayout(Protocol):
    """Anything that can be passed as `layout=`: it computes attention for one layer.

    query [1, heads, n, head_dim], key and value [1, kv_heads, n, head_dim] -> [n, heads, head_dim].
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor: ...


@dataclass
class Block:
    """A few groups of similar size, padded to g groups x S responses x R tokens behind P prompt tokens.

    prompt_rows [g, P] and response_rows [g, S, R] hold indices into the packed sequence (0 where there is padding);
    *_cells hold, for the real entries only, (position in the padded block, position in the packed sequence).
    """

    prompt_rows: Int[Tensor, "g P"]
    prompt_lengths: Int[Tensor, " g"]
    response_rows: Int[Tensor, "g S R"]
    prompt_cells: tuple[Tensor, Tensor]
    response_cells: tuple[Tensor, Tensor]
    masks: dict[tuple[int | None, torch.dtype], tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Additive masks: prompt on prompt [P, P], response on prompt [g, 1, R, P], response on itself [R, R]."""
        if (window, dtype) not in self.masks:
            device = self.prompt_rows.device
            p = torch.arange(self.prompt_rows.shape[1], device=device)
            r = torch.arange(self.response_rows.shape[2], device=device)
            reach = float("inf") if window is None else window
            prompt = (p[None, :] > p[:, None]) | (p[:, None] - p[None, :] >= reach)
            length = self.prompt_lengths[:, None, None]
            cross = (p >= length) | (length + r[None, :, None] - p >= reach)
            own = (r[None, :] > r[:, None]) | (r[:, None] - r[None, :] >= reach)
            self.masks[window, dtype] = (_additive(prompt, dtype), _additive(cross, dtype).unsqueeze(1), _additive(own, dtype))
        return self.masks[window, dtype]


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))


@dataclass
class Layout:
    """Where everything lies in the packed sequence of some groups.

    input_ids, position_ids [N]; `predictor` [tokens]: for every response token, the packed position whose hidden state
    predicts it (the prompt's last token for the first one); `targets` [tokens]: the response tokens themselves;
    `last` [responses]: the packed position of every response's last token (only with `keep_last`).
    """

    input_ids: Int[Tensor, " n"]
    position_ids: Int[Tensor, " n"]
    predictor: Int[Tensor, " tokens"]
    targets: Int[Tensor, " tokens"]
    last: Int[Tensor, " responses"] | None
    blocks: list[Block]

    @classmethod
    def of(cls, groups: Sequence[Group], *, keep_last: bool, device: torch.device | str = "cpu") -> Layout:
        """Lay out groups. Without `keep_last` each response's last token is left out: nothing is predicted from it."""
        ids: list[int] = []
        positions: list[int] = []
        predictor: list[int] = []
        targets: list[int] = []
        last: list[int] = []
        spans: list[tuple[int, int, list[tuple[int, int]]]] = []
        for group in groups:
            start, length = len(ids), len(group.prompt.tokens)
            ids += group.prompt.tokens
            positions += range(length)
            answers: list[tuple[int, int]] = []
            for response in group.responses:
                first, kept = len(ids), len(response.tokens) - (not keep_last)
                ids += response.tokens[:kept]
                positions += range(length, length + kept)
                predictor.append(start + length - 1)
                predictor += range(first, first + len(response.tokens) - 1)
                targets += response.tokens
                last.append(first + kept - 1)
                answers.append((first, kept))
            spans.append((start, length, answers))

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return cls(
            tensor(ids),
            tensor(positions),
            tensor(predictor),
            tensor(targets),
            tensor(last) if keep_last else None,
            [_block(part, device) for part in _alike(spans)],
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention of the whole packed sequence (see AttentionLayout)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        if len(self.blocks) == 1:
            return attend_block(self.blocks[0], q, k, v, settings)
        out = q.new_zeros(q.shape)
        for block in self.blocks:
            out = out + attend_block(block, q, k, v, settings)
        return out


Span = tuple[int, int, list[tuple[int, int]]]


def _alike(spans: list[Span]) -> list[list[Span]]:
    """Cut the groups into runs whose padded attention does little more work than the real one.

    Work is counted in attention scores. A new block costs some two dozen small operations a layer, worth about 2^18 scores.
    """
    parts: list[list[Span]] = []
    real, shape = 0, (0, 0, 0)
    for start, length, answers in spans:
        longest = max((n for _, n in answers), default=0)
        work = length * length + sum(n * (length + n) for _, n in answers)
        grown = (max(shape[0], length), max(shape[1], len(answers)), max(shape[2], longest))
        if parts:
            padded = (len(parts[-1]) + 1) * (grown[0] ** 2 + grown[1] * grown[2] * (grown[0] + grown[2]))
        if not parts or padded > 1.5 * (real + work) + 2**18:
            parts.append([])
            real, grown = 0, (length, len(answers), longest)
        parts[-1].append((start, length, answers))
        real, shape = real + work, grown
    return parts


def _block(spans: list[Span], device: torch.device | str) -> Block:
    g = len(spans)
    P = max(length for _, length, _ in spans)
    S = max(len(answers) for _, _, answers in spans)
    R = max((n for _, _, answers in spans for _, n in answers), default=0)
    prompts = torch.tensor([_row(start, length, P) for start, length, _ in spans])
    missing = [(0, 0)]
    responses = torch.tensor([[_row(*answer, R) for answer in [*answers, *missing * (S - len(answers))]] for _, _, answers in spans])
    responses = responses.view(g, S, R)

    def cells(rows: Tensor) -> tuple[Tensor, Tensor]:
        real = rows.flatten() >= 0
        return real.nonzero()[:, 0].to(device), rows.flatten()[real].to(device)

    lengths = torch.tensor([length for _, length, _ in spans], device=device)
    rows = (prompts.clamp(min=0).to(device), responses.clamp(min=0).to(device))
    return Block(rows[0], lengths, rows[1], cells(prompts), cells(responses))


def _row(first: int, count: int, width: int) -> list[int]:
    """`count` places from `first` on, and -1 for padding."""
    return [*range(first, first + count), *[-1] * (width - count)]


def attend_block(
    block: Block,
    query: Float[Tensor, "n heads dim"],
    key: Float[Tensor, "n kv_heads dim"],
    value: Float[Tensor, "n kv_heads dim"],
    settings: AttentionSettings,
) -> Float[Tensor, "n heads dim"]:
    """Attention of one block's tokens; rows of other blocks are zero.

    Grouped-query attention needs no copy of keys: the query heads that share a key head are stacked along the rows.
    """
    n, heads, dim = query.shape
    kv = key.shape[1]
    rep = heads // kv
    g, P = block.prompt_rows.shape
    _, S, R = block.response_rows.shape
    prompt_mask, cross_mask, own_mask = block.mask(settings.window, query.dtype)

    def queries(rows: Tensor) -> Tensor:  # [..., L] -> [..., kv, rep * L, dim]
        x = query.index_select(0, rows.flatten()).view(*rows.shape, kv, rep, dim)
        return x.movedim(-4, -2).reshape(*rows.shape[:-1], kv, rep * rows.shape[-1], dim)

    def gather(x: Tensor, rows: Tensor) -> Tensor:  # [..., L] -> [..., kv, L, dim]
        return x.index_select(0, rows.flatten()).view(*rows.shape, kv, dim).transpose(-3, -2)

    def heads_last(x: Tensor, rows: Tensor) -> Tensor:  # [..., kv, rep * L, dim] -> [rows, heads, dim]
        x = x.reshape(*rows.shape[:-1], kv, rep, rows.shape[-1], dim).movedim(-2, -4)
        return x.reshape(rows.numel(), heads, dim)

    prompt_key, prompt_value = gather(key, block.prompt_rows), gather(value, block.prompt_rows)
    scores = _scores(queries(block.prompt_rows), prompt_key, settings)
    weights = torch.softmax(scores + prompt_mask.repeat(rep, 1), dim=-1)
    prompt_out = heads_last(weights @ prompt_value, block.prompt_rows)
    padded, packed = block.prompt_cells
    out = query.new_zeros(n, heads, dim).index_copy(0, packed, prompt_out.index_select(0, padded))
    if S == 0 or R == 0:
        return out

    # [g, kv, S, rep * R, dim]: one product against the prompt for all responses of a group, one against each response itself.
    response_query = queries(block.response_rows).transpose(1, 2)
    own_key = gather(key, block.response_rows).transpose(1, 2)
    own_value = gather(value, block.response_rows).transpose(1, 2)
    flat_query = response_query.reshape(g, kv, S * rep * R, dim)
    cross = _scores(flat_query, prompt_key, settings).view(g, kv, S * rep, R, P) + cross_mask.unsqueeze(1)
    own = _scores(response_query, own_key, settings).view(g, kv, S * rep, R, R) + own_mask
    weights = torch.softmax(torch.cat([cross, own], dim=-1), dim=-1)
    from_prompt = weights[..., :P].reshape(g, kv, S * rep * R, P) @ prompt_value
    from_own = weights[..., P:].reshape(g, kv, S, rep * R, R) @ own_value
    response_out = (from_prompt.view(g, kv, S, rep * R, dim) + from_own).transpose(1, 2)
    padded, packed = block.response_cells
    return out.index_copy(0, packed, heads_last(response_out, block.response_rows).index_select(0, padded))


def _scores(query: Tensor, key: Tensor, settings: AttentionSettings) -> Tensor:
    scores = (query @ key.transpose(-1, -2)) * settings.scale
    return scores if settings.softcap is None else torch.tanh(scores / settings.softcap) * settings.softcap


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    layout: AttentionLayout | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls in every attention layer; it hands the work to `layout`."""
    if layout is None or not getattr(module, "is_causal", True):
        raise ModelError(
            f"{type(module).__name__} does not pass trimtab's layout to a causal attention, so it cannot be packed",
            fix="use a decoder-only model whose attention goes through transformers.AttentionInterface (Llama, Qwen, Gemma, GPT-2, ...)",
        )
    if dropout:
        raise ModelError("attention dropout is on; log-probabilities would not be those of the policy", fix="set the model's dropout to 0")
    unsupported = [name for name in ("s_aux", "head_mask", "position_bias") if others.get(name) is not None]
    if unsupported:
        raise ModelError(f"{type(module).__name__} uses {', '.join(unsupported)}, which packed attention does not support")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    settings = AttentionSettings(scale, sliding_window, softcap)
    return layout.attend(getattr(module, "layer_idx", 0), query, key, value, settings).unsqueeze(0), None


def register() -> None:
    """Make the attention function known to transformers (idempotent)."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)
