"""A causal language model that is a table: one free logit for every (prefix, next token), for problems small enough to list.

It is an ordinary transformers model with one attention layer, so it runs through the same loading, packing, generation and training
as any other. The layer's queries are zero: it averages over the prefix a code in which every token has its own digit, and so tells
exactly which prefix it sees. The hidden state is that prefix's unit vector; the heads on it (logits, value, score) are tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


class TabularConfig(PretrainedConfig):  # type: ignore[misc]
    """prompts: the prompts' tokens; max_tokens: the longest response. Token 0 ends a response."""

    model_type = "trimtab_tabular"

    def __init__(self, vocab_size: int = 4, prompts: Sequence[Sequence[int]] = ((1,),), max_tokens: int = 4, **others: Any) -> None:
        others = {"eos_token_id": 0, "bos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False} | others
        super().__init__(**others)
        self.vocab_size, self.max_tokens = vocab_size, max_tokens
        self.prompts = [list(prompt) for prompt in prompts]
        self.num_hidden_layers = 1
        self.max_position_embeddings = max(map(len, self.prompts)) + max_tokens + 1

    @property
    def prefixes(self) -> list[tuple[int, ...]]:
        """Every prefix the table has a row for, whole responses among them."""
        found: list[tuple[int, ...]] = []
        for prompt in self.prompts:
            level: list[tuple[int, ...]] = [tuple(prompt)]
            for length in range(self.max_tokens + 1):
                found += level
                found += [(*prefix, 0) for prefix in level]
                if length < self.max_tokens:
                    level = [(*prefix, token) for prefix in level for token in range(1, self.vocab_size)]
        return found


class _Tabular(PreTrainedModel):  # type: ignore[misc]
    config_class = TabularConfig
    base_model_prefix = "model"
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    def get_input_embeddings(self) -> Any:
        return nn.Embedding(self.config.vocab_size, 0)  # only its size is ever asked for


class TabularModel(_Tabular):
    """The trunk: from tokens to the unit vectors of their prefixes. Row 0 stands for every prefix that is not in the table."""

    is_causal = True
    layer_idx = 0

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.post_init()

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """Codes of all prefixes in ascending order, and their rows."""
        base = self.config.vocab_size + 1
        codes = [sum((token + 1) * base**place for place, token in enumerate(prefix)) for prefix in self.config.prefixes]
        ordered, rows = torch.tensor(codes, dtype=torch.float64).sort()
        return ordered, rows + 1

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, **options: Any) -> BaseModelOutput:
        places = torch.arange(input_ids.shape[1])[None] if position_ids is None else position_ids
        base = float(self.config.vocab_size + 1)
        digits = (input_ids + 1).double() * torch.pow(base, places.double())
        value = digits[:, None, :, None]
        zeros = torch.zeros_like(value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, _causal_mean)
        mean, _ = attend(self, zeros, zeros, value, None, scaling=1.0, layout=options.get("layout"))
        code = (mean[:, :, 0, 0] * (places + 1)).round()
        codes, rows = self._rows
        at = torch.searchsorted(codes, code).clamp(max=len(codes) - 1)
        row = torch.where(codes[at] == code, rows[at], 0)
        return BaseModelOutput(last_hidden_state=nn.functional.one_hot(row, len(codes) + 1).to(self.config.dtype))


def _causal_mean(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
    count = torch.arange(1, value.shape[2] + 1)[:, None]
    return (value.cumsum(2) / count).transpose(1, 2), None


class TabularForCausalLM(_Tabular):
    """Logits as a table [prefixes, vocabulary]."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.lm_head = nn.Linear(len(config.prefixes) + 1, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def forward(self, input_ids: Tensor, **options: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.lm_head(self.model(input_ids, **options).last_hidden_state))


class TabularForSequenceClassification(_Tabular):
    """Scores as a table [prefixes, labels]: a reward model that can represent every reward, or a critic every value."""

    def __init__(self, config: TabularConfig) -> None:
        super().__init__(config)
        self.model = TabularModel(config)
        self.score = nn.Linear(len(config.prefixes) + 1, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **options: Any) -> SequenceClassifierOutput:
        return SequenceClassifierOutput(logits=self.score(self.model(input_ids, **options).last_hidden_state)[:, -1])


def register() -> None:
    """Make the model known to transformers' Auto classes (idempotent)."""
    AutoConfig.register(TabularConfig.model_type, TabularConfig, exist_ok=True)
    AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM, exist_ok=True)
    AutoModelForSequenceClassification.register(TabularConfig, TabularForSequenceClassification, exist_ok=True)
