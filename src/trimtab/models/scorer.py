"""A trunk with a scalar head: a reward model when read at the end token, a critic when read before every token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict, Field
from torch import Tensor, nn

from trimtab.batch import Batch, Outputs
from trimtab.config import Config
from trimtab.data.templates import Mode, Template
from trimtab.errors import DataError, ModelError, RewardError
from trimtab.models import loading
from trimtab.models.base import PackedModel
from trimtab.models.loading import ModelConfig
from trimtab.models.packed import Layout
from trimtab.types import Group, Response


class Note(Config):
    """What transformers has no place for, kept in trimtab.json beside the weights. Older notes, and none, mean one plain head."""

    model_config = ConfigDict(extra="ignore")

    gain: list[float] = Field([1.0], min_length=1, description="factor on each head's output")
    bias: list[float] = Field([0.0], min_length=1, description="added to each head's output after the factor")
    reads: Literal["response", "step", "token"] = Field("response", description="where the score was trained to be read")

    @classmethod
    def read(cls, folder: str) -> Note:
        file = Path(folder, loading.NOTE_FILE)
        return cls.model_validate(json.loads(file.read_text(encoding="utf-8")) if file.exists() else {})

    def write(self, folder: Path) -> None:
        file = folder / loading.NOTE_FILE
        file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **self.model_dump()}) + "\n", encoding="utf-8")


class Scorer(PackedModel):
    """r(x, y) = w . h_end, or V(x, y_<t) = w . h_t (no bias, as in transformers' sequence classifiers).

    With several heads (an ensemble on one trunk) the score is their mean. Kept in the layout of
    `AutoModelForSequenceClassification` with one label per head, so that it loads in plain transformers. That gives the heads'
    raw outputs: the gain and bias of `normalise` are in the note beside the weights, and only this class applies them.
    """

    def __init__(self, model: Any, template: Template, note: Note | None = None) -> None:
        super().__init__(model, template)
        self.note = note or Note()
        if self.plain.config.num_labels != self.heads:
            raise ModelError(
                f"the scorer has {self.heads} output(s), this model has {self.plain.config.num_labels}", fix="name a reward model"
            )
        self.head.to(torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32)

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        *,
        head: Literal["saved", "normal", "zero"],
        template: Mode = "auto",
        trainable: bool = True,
        heads: int = 1,
    ) -> Scorer:
        """Load a scorer ("saved", with as many heads as it has), or put new heads on a language model's trunk.

        "normal" draws w ~ N(0, 1 / (d + 1)) for each head, as a reward model starts; "zero" starts a critic at V = 0.
        """
        from transformers import AutoModelForSequenceClassification

        folder = loading.resolve_path(config.path)
        saved = Note.read(folder)
        note = saved if head == "saved" else Note(gain=[1.0] * heads, bias=[0.0] * heads)
        model = loading.load_model(AutoModelForSequenceClassification, config, num_labels=len(saved.gain))
        score = getattr(model, "score", None)
        if not isinstance(score, nn.Linear):
            raise ModelError(f"{type(model).__name__} has no linear `score` head", where=config.path, fix="use a decoder-only model")
        if head != "saved" and heads != score.out_features:  # the trunk of a scorer with another number of heads
            score = model.score = nn.Linear(score.in_features, heads, bias=False).to(score.weight)
            model.num_labels = model.config.num_labels = heads
        if head == "normal":
            generator = torch.Generator().manual_seed(0)
            score.weight.data = torch.randn(score.weight.shape, generator=generator).to(score.weight) / (score.in_features + 1) ** 0.5
        elif head == "zero":
            score.weight.data.zero_()
        model.requires_grad_(trainable and config.lora is None)
        if trainable and config.lora is not None:
            model = loading.add_adapter(model, config.lora, "SEQ_CLS")
        return cls(model, loading.load_template(folder, template), note)

    @property
    def head(self) -> Any:
        return self.plain.score

    @property
    def heads(self) -> int:
        """How many heads: more than one is an ensemble."""
        return len(self.note.gain)

    def normalise(self, gain: Sequence[float], bias: Sequence[float]) -> None:
        """From now on every head's score r is gain r + bias: kept in the note, applied wherever scores or values are read."""
        new_gain = [g * old for g, old in zip(gain, self.note.gain, strict=True)]
        new_bias = [g * old + b for g, old, b in zip(gain, self.note.bias, bias, strict=True)]
        self.note = self.note.model_copy(update={"gain": new_gain, "bias": new_bias})

    def scores(self, batch: Batch) -> Outputs:
        """One score per response, read at its end token; with several heads, every member's score too.

        A response that was cut off gets one too: a reward model judges the text, always from the same place (that it was cut
        off is for `missing_eos_penalty` to say).
        """
        states, layout = self._states(Batch(tuple(map(self._ended, batch.groups))), keep_last=True)
        assert layout.last is not None
        members = self._read(states, layout.last)
        return Outputs(scores=members.mean(1), members=members)

    def token_scores(self, batch: Batch) -> Outputs:
        """A score of every response token, read in the state after it: what a judge of steps or of prefixes says there."""
        states, layout = self._states(batch, keep_last=True)
        assert layout.last is not None
        after = layout.predictor.roll(-1)  # the state after a token is the one that predicts the next
        after[batch.last_token.to(after.device)] = layout.last
        return Outputs(token_scores=self._read(states, after).mean(1))

    def values(self, batch: Batch) -> Outputs:
        """V(x, y_<t) for every response token, read at the position that predicts it."""
        states, layout = self._states(batch, keep_last=False)
        return Outputs(values=self._read(states, layout.predictor).mean(1))

    def encode(self, group: Group, name: str) -> Group:
        """The same conversation in this model's own tokens. Raises RewardError, naming the reward, for what it cannot read."""
        try:
            prompt = self.template.prompt(group.prompt.text, group.prompt.row)
            answers = [(r.text, r.truncated and bool(r.text)) for r in group.responses]  # nothing at all is written as an end of turn
            return Group(prompt, tuple(self.template.response(prompt, text, truncated=cut) for text, cut in answers))
        except DataError as error:
            raise RewardError(
                f"reward model {name!r} cannot read a sample: {error.what}",
                where=f"prompt {group.prompt.as_text[:60]!r}",
                fix="use a reward model with the policy's tokenizer and template",
            ) from error

    def write(self, folder: Path) -> None:
        """Into an empty folder, in Hugging Face layout.

        transformers reads a batch's score at the last token that is not padding, so the saved padding token must not be a
        token that ends a response: a different special token is named when the tokenizer pads with EOS.
        """

        self.plain.config.pad_token_id = self._padding_token()
        self.model.save_pretrained(folder)
        loading.save_template(self.template, folder)
        self.note.write(folder)

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
        """Every head's score [rows, heads] of some states."""
        dtype = next(self.head.parameters()).dtype
        scores: Tensor = self.head(states.index_select(0, rows).to(dtype)).cpu()
        return scores * torch.tensor(self.note.gain, dtype=dtype) + torch.tensor(self.note.bias, dtype=dtype)
