"""The policy: a causal language model that reads packed batches, with an optional value head on the same trunk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.batch import Batch, Outputs
from trimtab.data.templates import Mode, Template
from trimtab.errors import ModelError
from trimtab.maths.full_kl import full_kl
from trimtab.maths.logprobs import Head, token_logprobs
from trimtab.models import loading
from trimtab.models.base import PackedModel
from trimtab.models.loading import ModelConfig
from trimtab.models.packed import Layout
from trimtab.types import Group, Prompt, Response

VALUE_HEAD_FILE = "value_head.safetensors"


class LanguageModel(PackedModel):
    """A causal language model over packed batches.

    model:      the transformers model (inside a peft wrapper when an adapter is trained).
    template:   its tokenizer and chat template.
    value_head: a linear map from hidden states to V(x, y_<t), zero at the start, or None.
    """

    def __init__(self, model: Any, template: Template) -> None:
        super().__init__(model, template)
        self.value_head: nn.Linear | None = None
        self._check()

    @classmethod
    def load(cls, config: ModelConfig, *, template: Mode = "auto", trainable: bool = True) -> LanguageModel:
        """Load a model and its tokenizer; with `trainable`, all weights or a new LoRA adapter receive gradients."""
        from transformers import AutoModelForCausalLM

        model = loading.load_model(AutoModelForCausalLM, config)
        eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        extra = () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        model.requires_grad_(trainable and config.lora is None)
        if trainable and config.lora is not None:
            model = loading.add_adapter(model, config.lora, "CAUSAL_LM")
        return cls(model, loading.load_template(loading.resolve_path(config.path), template, extra))

    @property
    def head(self) -> Head:
        """The output head, with whatever scaling the architecture applies to its logits."""
        output, config = self.plain.get_output_embeddings(), self.plain.config.get_text_config()
        if not isinstance(output, nn.Linear):
            raise ModelError(
                f"the output head is a {type(output).__name__}, not a linear layer", fix="keep lm_head out of lora.target_modules"
            )
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        return Head(output.weight, output.bias, scale, getattr(config, "final_logit_softcapping", None))

    def add_value_head(self) -> nn.Linear:
        """Put V(x, y_<t) = w . h + b on the policy's own hidden states, zero at the start, in float32."""
        width = self.head.weight.shape[1]
        exact = torch.float64 if self.head.weight.dtype == torch.float64 else torch.float32
        self.value_head = nn.Linear(width, 1, dtype=exact, device=self.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        return self.value_head

    def forward(
        self, batch: Batch, *, temperature: float = 1.0, entropy: bool = False, reference: tuple[Tensor, Head] | None = None
    ) -> Outputs:
        """Log-probabilities of every response token; entropies if asked; values if there is a value head.

        reference: another policy's predicting states and head; then the full KL to it at every prefix comes along.
        """
        states, targets = self.predictors(batch)
        logprobs, entropies = token_logprobs(states, self.head, targets, temperature=temperature, entropy=entropy)
        values = None if self.value_head is None else self._read_values(states)
        full = None if reference is None else full_kl(states, self.head, *reference, temperature).cpu()
        return Outputs(logprobs.cpu(), None if entropies is None else entropies.cpu(), values, full_kl=full)

    def values(self, batch: Batch) -> Outputs:
        """Values alone, whose gradient stays in the value head."""
        with torch.no_grad():
            states, _ = self.predictors(batch)
        return Outputs(values=self._read_values(states))

    def predictors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The hidden state that predicts each response token, and the tokens."""
        layout = Layout.of(batch.groups, keep_last=False, device=self.device)
        return self.hidden(layout.input_ids, layout.position_ids, layout).index_select(0, layout.predictor), layout.targets

    def _read_values(self, states: Tensor) -> Tensor:
        assert self.value_head is not None
        return self.value_head(states.to(self.value_head.weight.dtype))[:, 0].cpu()  # type: ignore[no-any-return]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The model as it was before its LoRA adapter: the reference policy at no memory."""
        with self.model.disable_adapter():
            yield

    def write(self, folder: Path) -> None:
        """Into an empty folder, in Hugging Face layout (an adapter as a peft adapter)."""
        self.model.save_pretrained(folder)
        loading.save_template(self.template, folder)
        if self.value_head is not None:
            save_file({name: p.detach().cpu() for name, p in self.value_head.state_dict().items()}, folder / VALUE_HEAD_FILE)

    @torch.no_grad()
    def _check(self) -> None:
        """Run two tiny responses packed and plain: whatever an architecture does that we do not know shows here."""
        vocabulary = self.plain.get_input_embeddings().num_embeddings
        ids = [int(i) for i in torch.linspace(1, vocabulary - 1, 8).long()]
        group = Group(Prompt(tuple(ids[:3]), ""), tuple(Response(tuple(ids[a:b]), "") for a, b in ((3, 6), (5, 7))))
        ours = self.forward(Batch((group,))).logprobs
        assert ours is not None
        with loading.plain_attention(self.plain) as plain:
            theirs = torch.cat([plain_logprobs(plain, group.prompt.tokens, r.tokens) for r in group.responses])
        tolerance = 0.3 if self.head.weight.dtype in (torch.bfloat16, torch.float16) else 1e-3
        if not torch.allclose(ours.double(), theirs.double().cpu(), atol=tolerance, rtol=tolerance):
            raise ModelError(
                f"{type(self.plain).__name__} gives other log-probabilities packed than plain "
                f"(largest difference {float((ours - theirs.cpu()).abs().max()):.3g}), so it is not supported",
                fix="use a decoder-only model with ordinary softmax attention (Llama, Qwen, Gemma, Mistral, GPT-2, ...)",
            )


def plain_logprobs(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Log-probabilities of one response by the model's ordinary forward pass: the definition that packing must meet."""
    ids = torch.tensor([[*prompt, *response]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    exact = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(exact, dim=-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
