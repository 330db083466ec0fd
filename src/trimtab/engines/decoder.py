"""One decoding step through a Llama-like trunk, in as few operations as it can be written in.

transformers runs a step of a small model in about forty operations a layer, many of which cost more to start than to compute.
Here the projections that read the same input are one matrix product, rotary tables are made once a step, and weights may lie in
the order in which the processor reads them. The layers are read off the transformers modules. Whether they have been understood
is checked against the model's own forward pass before the first use; a model that is not understood decodes through that.
In bfloat16 on a CPU the whole step is one compiled kernel (`kernels.decode`), where there is one for the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from trimtab import kernels
from trimtab.engines.cache import Cache, Prefill
from trimtab.kernels import decode
from trimtab.models.language import LanguageModel
from trimtab.models.scratch import Empty, elsewhere
from trimtab.types import Prompt


class Stepper(Protocol):
    """What reads one token in every row."""

    def hidden(self, tokens: Int[Tensor, " n"], positions: Int[Tensor, " n"], cache: Cache) -> Float[Tensor, "n width"]:
        """The last hidden state of every active row after its new token."""
        ...

    def logits(self, states: Float[Tensor, "n width"]) -> Float[Tensor, "n vocabulary"]:
        """The output layer alone, in the model's precision."""
        ...


class PlainStepper:
    """Decoding through the model's own forward pass."""

    def __init__(self, model: LanguageModel, empty: Empty = elsewhere) -> None:
        self.model = model

    def hidden(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        return self.model.hidden(tokens, positions, cache)

    def logits(self, states: Tensor) -> Tensor:
        head = self.model.head
        return nn.functional.linear(states, head.weight, head.bias)


class Unknown(Exception):
    """The model is not made of the parts that `Decoder` knows."""


class Decoder:
    """A Llama-like trunk (Llama, Mistral, Qwen 2 and 3, SmolLM, ...) and its head, for one token in every row.

        x <- x + O attend(rope(Q n(x)), rope(K n(x)), V n(x)),    x <- x + D (f(G m(x)) * U m(x)),    n, m: RMS norms

    Weights are taken over when it is made, so it is made anew when they change (see `fingerprint`). Sums x are kept in float32
    where the model's precision is bfloat16: nearer to the float32 model than the model's own pass, and fewer conversions.
    """

    def __init__(self, model: LanguageModel, empty: Empty = elsewhere) -> None:
        trunk, head = model.plain.base_model, model.head
        _expect(trunk, {"embed_tokens", "layers", "norm", "rotary_emb"})
        self.embedding, self.rotary = trunk.embed_tokens, trunk.rotary_emb
        self.layers = [_Layer(layer, index) for index, layer in enumerate(trunk.layers)]
        self.norm = _Norm(trunk.norm)
        self.head = Linear([head.weight], [head.bias])

    def hidden(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        x = self.embedding(tokens)
        dtype = x.dtype
        cos, sin = (table[0, :, None] for table in self.rotary(x[None], positions[None]))
        half = cos.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
        x = x if dtype == torch.float64 else x.float()
        for layer in self.layers:
            x = layer(x, cos, sin, cache)
        return self.norm(x)

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states)


class CompiledDecoder:
    """The same as one compiled kernel for all layers: bfloat16 on a CPU, without adapters.

    Sums x are in float32, and nothing is rounded to bfloat16 but what enters a product. A row's states do not depend on its company.
    """

    def __init__(self, model: LanguageModel, empty: Empty = elsewhere) -> None:
        if not kernels.serves(model.head.weight):
            raise Unknown(f"weights in {model.head.weight.dtype} on {model.device}, for which there are no kernels")
        trunk, head = model.plain.base_model, model.head
        _expect(trunk, {"embed_tokens", "layers", "norm", "rotary_emb"})
        attention, mlp = _parts(trunk.layers[0])
        dim, inner = attention.head_dim, mlp.gate_proj.out_features
        heads, kv = (p.out_features // dim for p in (attention.q_proj, attention.k_proj))
        width: int = attention.q_proj.in_features
        turned, _ = trunk.rotary_emb(head.weight[None, :1], torch.zeros(1, 1, dtype=torch.long))
        if not decode.shapes_fit(width, heads, kv, dim, inner) or turned.shape[-1] != dim:
            raise Unknown("a trunk of sizes that the kernel does not know")
        self.embedding, self.rotary = trunk.embed_tokens, trunk.rotary_emb
        layers = [_compiled(layer, empty) for layer in trunk.layers]
        if {layer.sizes() for layer in layers} != {(width, (heads + 2 * kv) * dim, heads * dim, width, width, inner, width)}:
            raise Unknown("layers of different sizes")
        self.trunk = decode.Trunk(layers, _Norm(trunk.norm).setting, heads, kv, dim, inner)
        self.head = decode.Matrix([head.weight], [head.bias], empty)

    def hidden(self, tokens: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        x = self.embedding(tokens)
        cos, sin = (table[0] for table in self.rotary(x[None], positions[None]))
        stored = [
            decode.Stored(cache.own[i], cache.prompts[i], asked.scale, asked.window or 0, asked.softcap or 0.0)
            for i, asked in sorted(cache.settings.items())
        ]
        return self.trunk.step(x, cos, sin, stored, cache.reading.int())

    def logits(self, states: Tensor) -> Tensor:
        return self.head(states)


def _compiled(layer: Any, empty: Empty) -> decode.Layer:
    """The layer's weights, as the kernel reads them."""
    attention, mlp = _parts(layer)
    probe = torch.linspace(-4, 4, 9)
    if not torch.equal(mlp.act_fn(probe), nn.functional.silu(probe)):
        raise Unknown(f"the activation {type(mlp.act_fn).__name__}")
    query, key, value = (_linear(p) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
    biases = [p.bias.detach() for p in (query, key, value) if p.bias is not None]
    if len(biases) not in (0, 3):
        raise Unknown("biases in some of the projections of one input")
    mixed = torch.cat([p.weight.detach() for p in (query, key, value)])
    qkv = decode.Matrix([mixed], [torch.cat(biases) if biases else None], empty)
    out, gate, up, down = (_linear(p) for p in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    norms = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return decode.Layer(
        qkv,
        decode.Matrix([out.weight], [out.bias], empty),
        decode.Matrix([gate.weight, up.weight], [gate.bias, up.bias], empty),
        decode.Matrix([down.weight], [down.bias], empty),
        _Norm(layer.input_layernorm).setting,
        _Norm(layer.post_attention_layernorm).setting,
        *(None if norm is None else _Norm(norm).setting for norm in norms),
    )


def _linear(layer: Any) -> nn.Linear:
    if type(layer) is not nn.Linear or layer.weight.dtype != torch.bfloat16:
        raise Unknown(f"a projection of type {type(layer).__name__}")
    return layer


def _parts(layer: Any) -> tuple[Any, Any]:
    """Attention and feed-forward part of a layer that is made as expected."""
    _expect(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
    _expect(layer.self_attn, {"q_proj", "k_proj", "v_proj", "o_proj"}, frozenset({"q_norm", "k_norm"}))
    _expect(layer.mlp, {"gate_proj", "up_proj", "down_proj", "act_fn"})
    return layer.self_attn, layer.mlp


class _Layer:
    def __init__(self, layer: Any, index: int) -> None:
        attention, mlp = _parts(layer)
        self.index, self.dim, self.activation = index, attention.head_dim, mlp.act_fn
        self.before, self.between = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.query_norm = _Norm(attention.q_norm) if hasattr(attention, "q_norm") else None
        self.key_norm = _Norm(attention.k_norm) if hasattr(attention, "k_norm") else None
        self.qkv = fused(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = fused(attention.o_proj)
        self.gate_up = fused(mlp.gate_proj, mlp.up_proj)
        self.down = fused(mlp.down_proj)
        self.heads, self.kv = (p.out_features // self.dim for p in (attention.q_proj, attention.k_proj))
        self.inner = mlp.gate_proj.out_features

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, cache: Cache) -> Tensor:
        heads, kv = self.heads, self.kv
        qkv = self.qkv(self.before(x)).view(len(x), -1, self.dim)
        qk = qkv[:, : heads + kv]
        if self.query_norm is not None and self.key_norm is not None:
            qk = torch.cat([self.query_norm(qk[:, :heads]), self.key_norm(qk[:, heads:])], dim=1)
        turned = (qk * cos).addcmul_(qk.roll(self.dim // 2, -1), sin)
        attended = cache.attend_rows(self.index, turned[:, :heads], turned[:, heads:], qkv[:, heads + kv :])
        x = x + self.out(attended.flatten(1)).to(x.dtype)
        gate_up = self.gate_up(self.between(x))
        return x + self.down(self.activation(gate_up[:, : self.inner]).mul_(gate_up[:, self.inner :])).to(x.dtype)


class _Norm:
    """x / sqrt(mean(x^2) + eps) * weight, in float32 until the weight is applied; in float64 the model's own."""

    def __init__(self, norm: Any) -> None:
        if not hasattr(norm, "variance_epsilon"):
            raise Unknown(type(norm).__name__)
        self.own, self.weight, self.eps = norm, norm.weight, norm.variance_epsilon
        self.setting = self.weight, self.eps

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            exact: Tensor = self.own(x)
            return exact
        return torch.rms_norm(x.float(), x.shape[-1:], None, self.eps).to(self.weight.dtype).mul_(self.weight)


def _expect(module: nn.Module, parts: set[str], optional: frozenset[str] = frozenset()) -> None:
    """The module has these parts and no others that take part in a step."""
    names = {name for name, _ in module.named_children()}
    if not parts <= names <= parts | optional:
        raise Unknown(f"{type(module).__name__} with parts {', '.join(sorted(names))}")


class Linear:
    """x W^T + b for the rows of several weights at once, and a low-rank term x A^T B^T in the precision of A and B.

    In bfloat16 on a CPU the weights are reordered into the blocks that the matrix library multiplies: once, not in every step.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], low_rank: tuple[Tensor, Tensor] | None = None) -> None:
        if len({bias is None for bias in biases}) > 1:
            raise Unknown("biases in some of the projections of one input")
        whole = [b.detach() for b in biases if b is not None]
        self.bias = torch.cat(whole) if whole else None
        self.low_rank = low_rank
        weight = weights[0].detach() if len(weights) == 1 else torch.cat([w.detach() for w in weights])
        self.packed = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR) if self.packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self.packed:
            y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, "none", [], "")
        else:
            y = nn.functional.linear(x, self.weight, self.bias)
        if self.low_rank is None:
            return y
        down, up = self.low_rank
        return (y + nn.functional.linear(nn.functional.linear(x.to(down.dtype), down), up)).to(y.dtype)


_PACKED_FOR = 64
"""The number of rows for which the matrix library chooses its order of weights."""


def fused(*layers: Any) -> Linear:
    """One product for linear layers that read the same input, with the adapters that are switched on."""
    plain = [getattr(layer, "base_layer", layer) for layer in layers]
    if any(type(layer) is not nn.Linear for layer in plain):
        raise Unknown(" and ".join(type(layer).__name__ for layer in layers))
    adapters = [_adapter(layer) for layer in layers]
    low_rank = None
    if any(adapters):
        down, up = zip(*((a or _no_adapter(layer)) for a, layer in zip(adapters, plain, strict=True)), strict=True)
        low_rank = torch.cat(down), torch.block_diag(*up)
    return Linear([layer.weight for layer in plain], [layer.bias for layer in plain], low_rank)


def _adapter(layer: Any) -> tuple[Tensor, Tensor] | None:
    """(A, s B) of a peft LoRA layer, if it has one that is switched on."""
    if not hasattr(layer, "base_layer") or layer.disable_adapters:
        return None
    if not hasattr(layer, "lora_A") or layer.merged or len(layer.active_adapters) != 1 or getattr(layer, "lora_variant", None):
        raise Unknown(f"an adapter of type {type(layer).__name__}")
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name], layer.lora_B[name]
    if up.bias is not None:
        raise Unknown("an adapter with a bias")
    return down.weight.detach(), up.weight.detach() * layer.scaling[name]


def _no_adapter(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    return layer.weight.new_zeros(0, layer.in_features), layer.weight.new_zeros(layer.out_features, 0)


def fingerprint(model: LanguageModel) -> tuple[object, ...]:
    """Changes whenever a weight is replaced or written to, and when adapters are switched on or off.

    Weights may change without a trace in their version (through `.data`), so their bits are added up: milliseconds for 100M.
    """
    weights = ((p.data_ptr(), p._version, _sum_of_bits(p.detach())) for p in model.plain.parameters())
    return (*weights, *(module.disable_adapters for module in model.plain.modules() if hasattr(module, "disable_adapters")))


def _sum_of_bits(x: Tensor) -> tuple[float, ...]:
    flat, word = x.flatten(), 8 // x.element_size()
    whole = len(flat) - len(flat) % word
    return (int(flat[:whole].view(torch.int64).sum()), *flat[whole:].tolist())


Kind = Callable[[LanguageModel, Empty], Stepper]
"""Makes a stepper of a model's weights as they are; where it reorders them, into arrays that it is given."""


def choose(model: LanguageModel, empty: Empty = elsewhere) -> Kind:
    """`CompiledDecoder` or `Decoder`, if it understands the model, else `PlainStepper`."""
    kinds: tuple[Kind, ...] = (CompiledDecoder, Decoder)
    for kind in kinds:
        try:
            if _agree(model, kind(model, empty)):
                return kind
        except Unknown:
            continue
    return PlainStepper


@torch.no_grad()
def _agree(model: LanguageModel, decoder: Stepper) -> bool:
    """Do both give the same states for a few tokens after two tiny prompts?"""
    vocabulary = model.head.weight.shape[0]
    ids = torch.linspace(1, vocabulary - 1, 12, device=model.device).long()
    prompts = [Prompt(tuple(ids[:3].tolist()), ""), Prompt(tuple(ids[2:7].tolist()), "")]
    prefill = Prefill(prompts, model.device)
    model.hidden(prefill.packed.input_ids, prefill.packed.position_ids, prefill)
    said = []
    for stepper in (PlainStepper(model), decoder):
        cache = Cache(3, 4, model.device)
        cache.admit(prefill, [0, 1, 1])
        said.append(torch.cat([stepper.hidden(ids[3 * t : 3 * t + 3], cache.step(), cache).double() for t in range(2)]))
    plain, ours = said
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-3}.get(model.head.weight.dtype, 0.1)
    return bool((plain - ours).norm() <= tolerance * plain.norm())
