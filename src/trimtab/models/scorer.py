"""A trunk with a scalar head: a reward model when read at the end token, a critic when read before every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trimtab.batch import Batch, Outputs
from trimtab.data.templates import Mode, Template
from trimtab.errors import ModelError
from trimtab.models import loading
from trimtab.models.base import PackedModel
from trimtab.models.loading import ModelConfig
from trimtab.models.packed import Layout
from trimtab.types import Group, Response


class Scorer(PackedModel):
    """r(x, y) = w . h_end, or V(x, y_<t) = w . h_t (no bias, as in transformers' sequence classifiers).

    Kept in the layout of `AutoModelForSequenceClassification` with one label, so that it loads in plain transformers.
    """

    def __init__(self, model: Any, template: Template) -> None:
        super().__init__(model, template)
        if self.plain.config.num_labels != 1:
            raise ModelError(f"a scorer has one output, this model has {self.plain.config.num_labels}", fix="name a reward model")
        self.head.to(torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        head: Literal["saved", "normal", "zero"],
        template: Mode = "auto",
        trainable: bool = True,
    ) -> Scorer:
        """Load a scorer ("saved"), or put a new head on a language model's trunk.

        "normal" draws w ~ N(0, 1 / (d + 1)), as a reward model starts; "zero" starts a critic at V = 0.
        """
        from transformers import AutoModelForSequenceClassification

        model = loading.load_model(AutoModelForSequenceClassification, config, num_labels=1)
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear):
            raise ModelError(f"{type(model).__name__} has no linear `score` head", where=config.path, fix="use a decoder-only model")
        if head == "normal":
            generator = torch.Generator().manual_seed(0)
            score.weight.data = torch.randn(score.weight.shape, generator=generator).to(score.weight) / (score.in_features + 1) ** 0.5
        elif head == "zero":
            score.weight.data.zero_()
        model.requires_grad_(trainable and config.lora is None)
        if trainable and config.lora is not None:
            model = loading.add_adapter(model, config.lora, "SEQ_CLS")
        return cls(model, loading.load_template(loading.resolve_path(config.path), template))

    @property
    def head(self) -> Any:
        return self.plain.score

    def scores(self, batch: Batch) -> Outputs:
        """One score per response, read at its end token.

        A response that was cut off gets one too: a reward model judges the text, always from the same place (that it was cut
        off is for `missing_eos_penalty` to say).
        """
        states, layout = self._states(Batch(tuple(map(self._ended, batch.groups))), keep_last=True)
        assert layout.last is not None
        return Outputs(scores=self._read(states, layout.last))

    def values(self, batch: Batch) -> Outputs:
        """V(x, y_<t) for every response token, read at the position that predicts it."""
        states, layout = self._states(batch, keep_last=False)
        return Outputs(values=self._read(states, layout.predictor))

    def save(self, folder: Path) -> Path:
        """Save in Hugging Face layout, atomically.

        transformers reads a batch's score at the last token that is not padding, so the saved padding token must not be a
        token that ends a response: a different special token is named when the tokenizer pads with EOS.
        """

        def write(staging: Path) -> None:
            self.plain.config.pad_token_id = self._padding_token()
            self.model.save_pretrained(staging)
            loading.save_template(self.template, staging)

        return loading.save_atomically(folder, write)

    def _ended(self, group: Group) -> Group:
        end, ends = self.template.end_id, self.template.eos_ids
        if all(r.tokens[-1] in ends for r in group.responses):
            return group
        return Group(group.prompt, tuple(r if r.tokens[-1] in ends else Response((*r.tokens, end), r.text) for r in group.responses))

    def _padding_token(self) -> int:
        tokenizer, ends = self.template.tokenizer, self.template.eos_ids
        candidates = [tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, *sorted(tokenizer.all_special_ids)]
        return next((i for i in candidates if i is not None and i not in ends), len(tokenizer) - 1)

    def _states(self, batch: Batch, *, keep_last: bool) -> tuple[Tensor, Layout]:
        layout = Layout.of(batch.groups, keep_last=keep_last, device=self.device)
        return self.hidden(layout.input_ids, layout.position_ids, layout), layout

    def _read(self, states: Tensor, rows: Tensor) -> Tensor:
        dtype = next(self.head.parameters()).dtype
        scores: Tensor = self.head(states.index_select(0, rows).to(dtype))
        return scores[:, 0].cpu()
