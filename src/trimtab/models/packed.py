"""The packed shared-prompt forward pass: each prompt once, its responses behind it, no padding.

A batch is one sequence of N tokens,

    x1 y1,1 y1,2 ...  x2 y2,1 y2,2 ...

with position ids that restart every response right after its prompt. An attention function registered with
`transformers.AttentionInterface` reads a `layout=` keyword that travels through the model's own `forward` to every layer:
prompt tokens attend causally to their prompt, response tokens to their prompt and causally to themselves. Everything but
attention works token by token, so the result equals running each (prompt, response) sequence alone.

Attention itself is in `models.attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from trimtab.errors import ModelError
from trimtab.models.attention import AttentionSettings, Plan, attention
from trimtab.models.blocks import Span
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
        spans: list[Span] = []
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
            return torch.from_numpy(np.fromiter(values, np.int64)).to(device)  # a quarter of the time of torch.tensor

        return cls(
            tensor(ids),
            tensor(positions),
            tensor(predictor),
            tensor(targets),
            tensor(last) if keep_last else None,
            Plan(spans, len(ids), device),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        """Attention of the whole packed sequence (see AttentionLayout)."""
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        return attention(q, k, v, self.plan, settings)


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
