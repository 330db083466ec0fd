"""Layers of the Llama kind (Llama, Mistral, Qwen, SmolLM, ...) that take the compiled kernels where these can serve.

Only `forward` of single modules is replaced: names, weights, adapters and saved files stay as they are, and whatever a kernel does not
serve (another precision, another device, another attention) goes through the module's own. A norm or gate is replaced if it is seen to
compute the same; attention is checked with the whole model when a policy is loaded.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import kernels
from trimtab.kernels import elementwise, products
from trimtab.models import packed

ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
ATTENTION_CLASSES = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}


def take_kernels(model: nn.Module) -> None:
    """Let the layers of a model use the kernels. Changes nothing where there are none."""
    if kernels.library() is None:
        return
    same: dict[type, bool] = {}
    for module in model.modules():
        replacement, example = _replacement(module)
        if replacement is None:
            continue
        kind = type(module)
        if kind not in same:
            same[kind] = example is None or _agree(module, replacement, example)
        if same[kind]:
            module.forward = MethodType(replacement, module)  # a method, so that a copied module takes its own weights


def _replacement(module: Any) -> tuple[Any, Tensor | None]:
    """The forward pass of ours for a module, and an input on which both are compared; None for a module of another kind."""
    parts = {name for name, _ in module.named_children()}
    weight = next(module.parameters(recurse=True), None)
    if weight is None or not kernels.serves(weight):
        return None, None
    if type(module) is nn.Linear and products.usable(weight):
        return _linear, None
    if hasattr(module, "variance_epsilon") and not parts and weight.numel() % 16 == 0:
        return _norm, _example(weight.numel())
    if parts == {"gate_proj", "up_proj", "down_proj", "act_fn"} and module.gate_proj.out_features % 16 == 0:
        return _mlp, _example(module.gate_proj.in_features)
    if type(module).__name__ in ATTENTION_CLASSES and parts >= ATTENTION_PARTS:
        return _attention, None
    return None, None


def _example(width: int) -> Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


@torch.no_grad()
def _agree(module: nn.Module, replacement: Any, example: Tensor) -> bool:
    own, ours = module(example).float(), replacement(module, example).float()
    return bool((own - ours).norm() <= 0.02 * own.norm())


def _linear(self: Any, input: Tensor) -> Tensor:
    if not kernels.serves(input) or not products.usable(self.weight):
        own: Tensor = type(self).forward(self, input)
        return own
    return products.linear(input, self.weight, self.bias)


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    if not kernels.serves(hidden_states) or self.weight.dtype != torch.bfloat16:
        own: Tensor = type(self).forward(self, hidden_states)
        return own
    return elementwise.rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _mlp(self: Any, x: Tensor) -> Tensor:
    gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
    served = kernels.serves(gate) and kernels.serves(up)
    if served and type(down) is nn.Linear and products.usable(down.weight):
        return products.gated_linear(gate, up, down.weight, down.bias)
    found: Tensor = down(elementwise.swiglu(gate, up) if served else self.act_fn(gate) * up)
    return found


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **others: Any,
) -> Any:
    cos, sin = position_embeddings
    ours = self.config._attn_implementation == packed.ATTENTION and past_key_values is None and len(hidden_states) == 1
    if not ours or not kernels.serves(hidden_states) or not kernels.serves(cos) or cos.shape[-1] != self.head_dim or self.head_dim % 32:
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **others)
    query, key, value = (
        project(hidden_states)[0].unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    query = self.q_norm(query) if hasattr(self, "q_norm") else query
    key = self.k_norm(key) if hasattr(self, "k_norm") else key
    query, key = (elementwise.rotate(x, cos[0], sin[0]).transpose(0, 1)[None] for x in (query, key))
    window = others.pop("sliding_window", getattr(self, "sliding_window", None))
    found, _ = packed.packed_attention(
        self, query, key, value.transpose(0, 1)[None], None, scaling=self.scaling, sliding_window=window, **others
    )
    return self.o_proj(found.flatten(2)), None
