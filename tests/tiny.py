"""Tiny real models and tokenizers with random weights, made in memory: every architecture we promise, in milliseconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

VOCABULARY = 128
CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat: bool = False) -> Any:
    """A byte-like tokenizer: one token per printable ASCII character; pad and EOS are the same token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|end|>", "<|start|>", "<|user|>", "<|assistant|>", "<|system|>", "<|spare|>", "<|unk|>"]
    vocabulary = {token: i for i, token in enumerate(specials)}
    for code in range(32, 127):
        vocabulary[chr(code)] = len(vocabulary)
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|end|>", bos_token="<|start|>", unk_token="<|unk|>",
        additional_special_tokens=specials[2:6],
    )  # fmt: skip
    if chat:
        fast.chat_template = CHAT
    return fast


def config(architecture: str, **changes: Any) -> Any:
    """The configuration of a tiny model: "llama", "mistral", "qwen2", "qwen3", "gemma3" or "gpt2"."""
    from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    special: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    common: dict[str, Any] = {
        **special, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    }  # fmt: skip
    if architecture == "llama":
        return LlamaConfig(**{**common, "tie_word_embeddings": True, **changes})
    if architecture == "mistral":
        return MistralConfig(**{**common, "sliding_window": 5, **changes})
    if architecture == "qwen2":
        own = {"use_sliding_window": True, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
        return Qwen2Config(**{**common, **own, **changes})
    if architecture == "qwen3":
        return Qwen3Config(**{**common, "head_dim": 16, **changes})
    if architecture == "gemma3":
        own = {"head_dim": 16, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 16}
        return Gemma3TextConfig(**{**common, **own, "final_logit_softcapping": 5.0, **changes})
    if architecture == "gpt2":
        own = {**special, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
        return GPT2Config(**{**own, **changes})
    raise ValueError(architecture)


def model(architecture: str, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 3.0, **changes: Any) -> Any:
    """A causal language model with random weights, larger than the usual initialisation so that attention is not uniform."""
    from transformers import AutoModelForCausalLM

    from trimtab.models import loading, packed

    packed.register()
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config(architecture, **changes), attn_implementation=packed.ATTENTION)
    for name, parameter in made.named_parameters():
        if parameter.dim() > 1 and "norm" not in name:
            parameter.data *= scale
    loading._switch_off_dropout(made)
    return made.to(dtype).eval()


def folder(
    path: Path, architecture: str = "llama", chat: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """The same saved in Hugging Face layout with its tokenizer."""
    model(architecture, dtype, seed, **changes).save_pretrained(path)
    tokenizer(chat).save_pretrained(path)
    return path


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []
        self.rows: list[dict[str, Any]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []

    def log(self, step: int, metrics: Any) -> None:
        self.metrics.append({"step": step, **metrics})

    def samples(self, step: int, rows: Any) -> None:
        self.rows += [{"step": step, **row} for row in rows]

    def event(self, kind: str, **details: Any) -> None:
        self.events.append((kind, details))

    def rewind(self, step: int) -> None:
        self.metrics = [row for row in self.metrics if row["step"] < step]
        self.rows = [row for row in self.rows if row["step"] < step]

    def close(self) -> None:
        pass
