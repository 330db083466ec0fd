"""What the policy and the scorers share: a transformers model that reads packed batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.data.templates import Template
from trimtab.models import loading
from trimtab.models.packed import AttentionLayout
from trimtab.snapshot import save_atomically


class PackedModel:
    """A transformers model (inside a peft wrapper when an adapter is trained), its tokenizer and its template."""

    def __init__(self, model: Any, template: Template) -> None:
        self.model, self.template = model, template

    @property
    def plain(self) -> Any:
        """The transformers model without its peft wrapper (the adapter's layers stay in it)."""
        return loading.unwrap(self.model)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def context(self) -> int:
        """The longest prompt + response the model can read, in tokens."""
        return int(getattr(self.plain.config.get_text_config(), "max_position_embeddings", 2**31))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The model's trainable parameters by name."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def write(self, folder: Path) -> None:
        """Into an empty folder, in Hugging Face layout."""
        raise NotImplementedError

    def save(self, folder: Path) -> Path:
        """The same, atomically: the folder is there whole or not at all."""
        return save_atomically(folder, self.write)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, layout: AttentionLayout) -> Tensor:
        """The trunk's last hidden states [n, width] of a packed sequence."""
        trunk, embedding = self.plain.base_model, self.plain.get_input_embeddings()
        read = {"input_ids": input_ids[None]}
        if torch.is_grad_enabled() and type(embedding) is nn.Embedding and getattr(embedding.weight, "main_grad", None) is not None:
            read = {"inputs_embeds": _Lookup.apply(embedding.weight, input_ids, embedding.padding_idx)[None]}  # type: ignore[no-untyped-call]
        last: Tensor = trunk(**read, position_ids=position_ids[None], layout=layout, use_cache=False).last_hidden_state
        return last[0]


class _Lookup(torch.autograd.Function):
    """Rows of an embedding, whose gradient is added to the rows of `main_grad` alone: no array as large as the vocabulary is made."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> Tensor:
        ctx.sink, ctx.padding = weight.main_grad, padding  # type: ignore[attr-defined]
        ctx.save_for_backward(ids)
        return nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (ids,), grad = ctx.saved_tensors, grads[0].to(ctx.sink.dtype)
        if ctx.padding is not None:
            grad = grad.masked_fill(ids[:, None] == ctx.padding, 0.0)
        ctx.sink.index_add_(0, ids, grad)
        return None, None, None
