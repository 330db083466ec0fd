"""Layers of the Llama kind (Llama, Mistral, Qwen, SmolLM, ...) that take the compiled kernels where these can serve.

Only `forward` of modules is replaced: names, weights, adapters and saved files stay as they are, and whatever a kernel does not serve
(another precision, another device, another attention) goes through the module's own. A layer whose parts are all served is computed
whole (`kernels.layer`); one with an adapter, say, part by part. A norm or gate is replaced if it is seen to compute the same; attention
is checked with the whole model when a policy is loaded.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import kernels
from trimtab.kernels import elementwise, layer, products
from trimtab.kernels.attention import Sequences
from trimtab.models import packed
from trimtab.models.attention import AttentionSettings

ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
ATTENTION_CLASSES = {"LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention"}
LAYER_CLASSES = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}


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
    for module in model.modules():
        if type(module).__name__ in LAYER_CLASSES and all(_replaced(part) for part in _parts(module)):
            module.forward = MethodType(_layer, module)


def _parts(module: Any) -> tuple[nn.Module, ...]:
    return module.self_attn, module.mlp, module.input_layernorm, module.post_attention_layernorm


def _replaced(module: Any) -> bool:
    return isinstance(module.forward, MethodType) and module.forward.__func__ in (_attention, _mlp, _norm)


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
    gate, up = self.gate_proj(x), self.up_proj(x)
    served = kernels.serves(gate) and kernels.serves(up)
    found: Tensor = self.down_proj(elementwise.swiglu(gate, up) if served else self.act_fn(gate) * up)
    return found


def _attention(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Any = None,
    past_key_values: Any = None,
    **others: Any,
) -> Any:
    if past_key_values is not None or not _served(self, hidden_states, position_embeddings):
        return type(self).forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **others)
    cos, sin = position_embeddings
    query, key, value = (
        project(hidden_states)[0].unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
    )
    query = self.q_norm(query) if hasattr(self, "q_norm") else query
    key = self.k_norm(key) if hasattr(self, "k_norm") else key
    query, key = (elementwise.rotate(x, cos[0], sin[0]).transpose(0, 1)[None] for x in (query, key))
    value, settings = value.transpose(0, 1)[None], {"scaling": self.scaling, "sliding_window": _window(self)}
    found, _ = packed.packed_attention(self, query, key, value, None, **settings, **others)
    return self.o_proj(found.flatten(2)), None


def _served(attention: Any, hidden_states: Tensor, position_embeddings: Any) -> bool:
    """Whether attention over this packed batch, turned by these tables, can take the kernels."""
    cos, dim = position_embeddings[0], attention.head_dim
    ours = attention.config._attn_implementation == packed.ATTENTION and len(hidden_states) == 1
    return ours and kernels.serves(hidden_states) and kernels.serves(cos) and cos.shape[-1] == dim and dim % 32 == 0


def _layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Any = None,
    position_ids: Any = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: Any = None,
    layout: Any = None,
    **others: Any,
) -> Tensor:
    attention = self.self_attn
    if past_key_values is None and layout is not None and _served(attention, hidden_states, position_embeddings):
        parameters = _parameters(self)
        seen = _seen(attention, layout)
        if parameters is not None and seen is not None:
            cos, sin = position_embeddings
            return layer.layer(hidden_states, cos[0], sin[0], seen, _setting(self), parameters)
    passed = (hidden_states, attention_mask, position_ids, past_key_values, use_cache, position_embeddings)
    own: Tensor = type(self).forward(self, *passed, layout=layout, **others)
    return own


def _parameters(self: Any) -> layer.Parameters | None:
    """A layer's weights, if all are plain and served."""
    attention, mlp = self.self_attn, self.mlp
    linear = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if not all(type(part) is nn.Linear and products.usable(part.weight) for part in linear):
        return None
    heads = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    norms = [None if norm is None else norm.weight for norm in (self.input_layernorm, self.post_attention_layernorm, *heads)]
    if not all(weight is None or kernels.serves(weight) for weight in norms):
        return None
    weights, biases = ([getattr(part, name) for part in linear] for name in ("weight", "bias"))
    return layer.Parameters._make((*weights, *biases, *norms))


def _setting(self: Any) -> layer.Setting:
    attention, before, between = self.self_attn, self.input_layernorm, self.post_attention_layernorm
    eps = (before.variance_epsilon, between.variance_epsilon, getattr(getattr(attention, "q_norm", None), "variance_epsilon", 0.0))
    return layer.Setting(*eps, attention.head_dim, (attention.scaling, _window(attention), None))


def _window(attention: Any) -> int | None:
    """How far an attention looks back: Mistral reads it off the model's configuration, others off the layer."""
    place = attention.config if type(attention).__name__ == "MistralAttention" else attention
    return getattr(place, "sliding_window", None)


def _seen(attention: Any, layout: packed.AttentionLayout) -> Sequences | layer.Attend | None:
    """What tokens of a batch see; where nothing is learnt, any layout may attend. None: neither."""
    if type(layout) is packed.Layout:
        return layout.plan.sequences
    if torch.is_grad_enabled():
        return None
    settings = AttentionSettings(attention.scaling, _window(attention), None)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        return layout.attend(attention.layer_idx, query, key, value, settings)

    return attend
