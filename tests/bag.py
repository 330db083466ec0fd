"""A reward model whose class contains the truth: its state after a token is the count of every token read so far."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import tiny
from trimtab.data.templates import Template
from trimtab.models.attention import AttentionSettings
from trimtab.models.scorer import Note, Scorer


class BagOfTokens(nn.Module):
    """Uniform attention over one-hot tokens, times the number of tokens read, under a linear head."""

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        self.score = nn.Linear(tiny.VOCABULARY, heads, bias=False, dtype=torch.float64)
        self.score.weight.data.zero_()
        self.config = SimpleNamespace(num_labels=heads, get_text_config=lambda: SimpleNamespace())
        self.passes = 0

    @property
    def base_model(self) -> BagOfTokens:
        return self

    def get_input_embeddings(self) -> None:
        """Tokens are counted, not looked up."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, layout: Any, use_cache: bool) -> Any:
        self.passes += 1
        tokens = torch.nn.functional.one_hot(input_ids, tiny.VOCABULARY).to(torch.float64)[:, None]
        blank = torch.zeros_like(tokens)
        mean = layout.attend(0, blank, blank, tokens, AttentionSettings(1.0, None, None))[:, 0]
        return SimpleNamespace(last_hidden_state=(mean * (position_ids[0] + 1)[:, None])[None])


def scorer(heads: int = 1) -> Scorer:
    return Scorer(BagOfTokens(heads), Template.of(tiny.tokenizer()), Note(gain=[1.0] * heads, bias=[0.0] * heads))
