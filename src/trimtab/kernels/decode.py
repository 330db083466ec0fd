"""Decoding in bfloat16: a whole step of a Llama-like trunk, the output layer, and the draw of a token, each in one call."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trimtab import kernels

_PANEL = 48
"""Outputs that lie side by side in packed weights, as in decode.cpp."""

_MOST_SHARED = 64
"""Query heads that may share a key head."""

Norm = tuple[Tensor, float]
"""Weight and epsilon of an RMS norm."""


class _Matrix(ctypes.Structure):
    _fields_ = (("panels", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("inputs", ctypes.c_int), ("outputs", ctypes.c_int))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")),
        *((name, ctypes.c_void_p) for name in ("before", "between", "query_norm", "key_norm")),
        *((name, ctypes.c_float) for name in ("before_eps", "between_eps", "query_eps", "key_eps")),
    )


class _Trunk(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("count", "width", "heads", "kv", "dim", "inner")),
    )


class _Stored(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("own_keys", "own_values", "prompt_keys", "prompt_values")),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        ("stored", ctypes.POINTER(_Stored)),
        *((name, ctypes.c_void_p) for name in ("places", "lengths", "times", "cos", "sin")),
        *((name, ctypes.c_int) for name in ("rows", "room", "prompt_room")),
    )


class Matrix:
    """x W^T + b with weights in the kernel's order; several of the same shape lie side by side, panel by panel in turns."""

    def __init__(
        self,
        weights: Sequence[Float[Tensor, "out in"]],
        biases: Sequence[Float[Tensor, " out"] | None],
        empty: Callable[[int, int], Float[Tensor, "rows columns"]],
    ) -> None:
        """empty: makes the array of bfloat16 in which they lie."""
        self.inputs, self.turns = weights[0].shape[1], len(weights)
        padded = -(-weights[0].shape[0] // _PANEL) * _PANEL
        self.outputs = len(weights) * padded if len(weights) > 1 else weights[0].shape[0]
        self.panels = empty(len(weights) * padded, self.inputs)
        for i, weight in enumerate(weights):
            own = weight.detach().contiguous()
            _library().decode_pack(kernels.address(own), *own.shape, len(weights), i, kernels.address(self.panels))
        self.bias = None
        if any(bias is not None for bias in biases):
            rows = torch.zeros(len(weights), padded)
            for row, bias in zip(rows, biases, strict=True):
                if bias is not None:
                    row[: len(bias)] = bias.detach()
            self.bias = rows.view(len(weights), -1, _PANEL).transpose(0, 1).contiguous()

    def __call__(self, x: Float[Tensor, "n in"]) -> Float[Tensor, "n out"]:
        x = x.contiguous()
        y = torch.empty(len(x), self.outputs, dtype=torch.bfloat16)
        kernels.checked(_library().decode_linear(ctypes.byref(self.struct()), kernels.address(x), len(x), kernels.address(y)))
        return y

    def struct(self) -> _Matrix:
        return _Matrix(kernels.address(self.panels), kernels.address(self.bias), self.inputs, self.outputs)


@dataclass(frozen=True)
class Layer:
    """Weights of one layer: `gate_up` is a Matrix of the two; the norms of queries and keys may be missing."""

    qkv: Matrix
    out: Matrix
    gate_up: Matrix
    down: Matrix
    before: Norm
    between: Norm
    query_norm: Norm | None
    key_norm: Norm | None

    def sizes(self) -> tuple[int, ...]:
        """Inputs and outputs of qkv and of out, inputs of gate and up, inputs and outputs of down."""
        gate_up, down = self.gate_up, self.down
        return (self.qkv.inputs, self.qkv.outputs, self.out.inputs, self.out.outputs, gate_up.inputs, down.inputs, down.outputs)


@dataclass(frozen=True)
class Stored:
    """What a layer has read, in which the step's keys and values are put down, and how it attends (window 0, softcap 0: none)."""

    own: tuple[Float[Tensor, "rows kv room dim"], Float[Tensor, "rows kv room dim"]]
    prompts: tuple[Float[Tensor, "places kv prompt_room dim"], Float[Tensor, "places kv prompt_room dim"]]
    scale: float
    window: int
    softcap: float


def shapes_fit(width: int, heads: int, kv: int, dim: int, inner: int) -> bool:
    """Whether the kernel can compute a trunk of these sizes."""
    return width % 16 == 0 and dim % 32 == 0 and inner % 2 == 0 and heads % kv == 0 and heads // kv <= _MOST_SHARED


class Trunk:
    """All layers, for one token in every row."""

    def __init__(self, layers: Sequence[Layer], norm: Norm, heads: int, kv: int, dim: int, inner: int) -> None:
        self._kept: list[object] = [layers]
        width = layers[0].qkv.inputs
        self._layers = (_Layer * len(layers))(*(self._layer(layer) for layer in layers))
        self._trunk = _Trunk(self._layers, *self._norm(norm), len(layers), width, heads, kv, dim, inner)

    def step(
        self,
        x: Float[Tensor, "n width"],
        cos: Float[Tensor, "n dim"],
        sin: Float[Tensor, "n dim"],
        stored: Sequence[Stored],
        rows: Int[Tensor, "3 n"],
    ) -> Float[Tensor, "n width"]:
        """The final states of embedded tokens. `rows` (int32): each row's prompt, its prompt's length, the response tokens read before."""
        x, cos, sin = x.contiguous(), cos.float().contiguous(), sin.float().contiguous()
        kept = (_Stored * len(stored))(
            *(_Stored(*(y.data_ptr() for y in (*layer.own, *layer.prompts)), layer.scale, layer.softcap, layer.window) for layer in stored)
        )
        room, prompt_room = stored[0].own[0].shape[2], stored[0].prompts[0].shape[2]
        places = (kernels.address(y) for y in (*rows.unbind(), cos, sin))
        step, out = _Step(kept, *places, len(x), room, prompt_room), torch.empty_like(x)
        found = _library().decode_step(ctypes.byref(self._trunk), ctypes.byref(step), kernels.address(x), kernels.address(out))
        kernels.checked(found)
        return out

    def _layer(self, layer: Layer) -> _Layer:
        norms = [self._norm(norm) for norm in (layer.before, layer.between, layer.query_norm, layer.key_norm)]
        matrices = (m.struct() for m in (layer.qkv, layer.out, layer.gate_up, layer.down))
        return _Layer(*matrices, *(weight for weight, _ in norms), *(eps for _, eps in norms))

    def _norm(self, norm: Norm | None) -> tuple[ctypes.c_void_p, float]:
        if norm is None:
            return kernels.address(None), 0.0
        weight = norm[0].detach().float().contiguous()
        self._kept.append(weight)  # the structures hold addresses alone
        return kernels.address(weight), norm[1]


def draw(
    z: Float[Tensor, "rows vocabulary"], uniform: Float[Tensor, " rows"], scale: float, cap: float
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """A token of every row by inversion, and its log-probability. The logits are scale z, or cap tanh(scale z) where cap is not 0."""
    z, uniform = z.contiguous(), uniform.to(torch.float64).contiguous()
    tokens, logprobs = torch.empty(len(z), dtype=torch.long), torch.empty(len(z))
    arrays = (kernels.address(x) for x in (uniform, tokens, logprobs))
    kernels.checked(_library().decode_draw(kernels.address(z), *z.shape, ctypes.c_float(scale), ctypes.c_float(cap), *arrays))
    return tokens, logprobs


def _library() -> ctypes.CDLL:
    found = kernels.library()
    assert found is not None
    return found
