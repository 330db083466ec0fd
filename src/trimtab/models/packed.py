"""The packed shared-prompt forward pass: each prompt once, its responses behind it, no padding.

A batch is one sequence of N tokens,

    x1 y1,1 y1,2 ...  x2 y2,1 y2,2 ...

with position ids that restart every response right after its prompt. An attention function registered with
`transformers.AttentionInterface` reads a `layout=` keyword that travels through the model's own `forward` to every layer:
prompt tokens attend causally to their prompt, response tokens to their prompt and causally to themselves. Everything but
attention works token by token, so the result equals running each (prompt, response) sequence alone.

For attention only (`models.attention`), groups of similar size are laid side by side in small padded blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Int
from torch import Tensor, nn

from trimtab.errors import ModelError
from trimtab.models.attention import AttentionSettings, Block, Plan, attention
from trimtab.types import Group

ATTENTION = "trimtab_packed"
"""The name of the attention function; models are loaded with `attn_implementation=ATTENTION`."""


class AttentionLayout(Protocol):
    """Anything that can be passed as `layout=`: it computes attention for one layer.

    query [1, heads, n, head_dim], key and value [1, kv_heads, n, head_dim] -> [n, heads, head_dim].
    """

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor: ...


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
    plan: Plan

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
            Plan([_block(part, device) for part in _alike(spans)], len(ids)),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention of the whole packed sequence (see AttentionLayout)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attention(q, k, v, self.plan, settings)


Span = tuple[int, int, list[tuple[int, int]]]


def _alike(spans: list[Span]) -> list[list[Span]]:
    """Groups of similar size, whose padded attention does little more work than the real one.

    Work is counted in attention scores. A block of its own costs some fifty small operations a layer, worth about 2^15 scores.
    """
    parts: list[list[Span]] = []
    real, shape = 0, (0, 0, 0)
    for start, length, answers in sorted(spans, key=lambda span: (span[1], max((n for _, n in span[2]), default=0))):
        longest = max((n for _, n in answers), default=0)
        work = length * length + sum(n * (length + n) for _, n in answers)
        grown = (max(shape[0], length), max(shape[1], len(answers)), max(shape[2], longest))
        if parts:
            padded = (len(parts[-1]) + 1) * (grown[0] ** 2 + grown[1] * grown[2] * (grown[0] + grown[2]))
        if not parts or padded > 1.1 * (real + work) + 2**15:
            parts.append([])
            real, grown = 0, (length, len(answers), longest)
        parts[-1].append((start, length, answers))
        real, shape = real + work, grown
    return parts


def _block(spans: list[Span], device: torch.device | str) -> Block:
    """Groups side by side, and their responses, longest first, in parts of similar length."""
    width = max(length for _, length, _ in spans)
    prompts = torch.tensor([_row(start, length, width) for start, length, _ in spans], device=device).view(len(spans), width)
    sorted_answers = [sorted(answers, key=lambda answer: -answer[1]) for _, _, answers in spans]
    count = max(len(answers) for answers in sorted_answers)
    rows = [[*answers, *[(0, 0)] * (count - len(answers))] for answers in sorted_answers]
    longest = [max(n for _, n in column) for column in zip(*rows, strict=True)]
    parts, first = [], 0
    for i in range(1, count + 1):
        shorter = i < count and longest[i] < 0.75 * longest[first] and len(spans) * (longest[first] - longest[i]) > 32
        if i == count or shorter:
            R = longest[first]
            places = [[_row(*answer, R) for answer in row[first:i]] for row in rows]
            parts.append(torch.tensor(places, device=device).view(len(spans), i - first, R))
            first = i
    return Block(prompts, tuple(part for part in parts if part.numel()))


def _row(first: int, count: int, width: int) -> list[int]:
    """`count` places from `first` on, and -1 for padding."""
    return [*range(first, first + count), *[-1] * (width - count)]


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
