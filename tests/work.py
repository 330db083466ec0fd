"""What a piece of code makes the machine do, counted where torch dispatches its operations and where products of our own are called.

No clock is involved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from trimtab.kernels import head, layer, products
from trimtab.types import Group

PRODUCTS = (
    (products, "forward"), (products, "input_gradient"), (products, "add_weight_gradients"), (head, "of_rows"), (layer, "run"),
)  # fmt: skip
STEPS = {"before": range(3), "after": range(3, 7), "forward": range(7), "backward": range(7)}
"""The projections of a layer that take part in each step of it."""


class Work(TorchDispatchMode):
    """Counts while it is entered.

    tokens:   tokens looked up in every embedding table, by the table's place in memory: what every model has read.
    trunk:    operations (2 per multiply-add) of all matrix products but the head's.
    head:     those of which one side is a good part of the vocabulary.
    largest:  bytes of the largest tensor made, without those in the shape of a parameter (weights, their gradients and moments).
    """

    def __init__(self, vocabulary: int, parameter_shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.vocabulary, self.shapes = vocabulary, parameter_shapes | {shape[::-1] for shape in parameter_shapes}
        self.tokens: Counter[int] = Counter()
        self.trunk = self.head = self.largest = 0

    def __enter__(self) -> Work:
        self.plain = [getattr(module, name) for module, name in PRODUCTS]
        for (module, name), do in zip(PRODUCTS, self.plain, strict=True):
            counting = self._layers(do) if module is layer else self._counting(do, weights=1 if name == "add_weight_gradients" else 0)
            setattr(module, name, counting)
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for (module, name), do in zip(PRODUCTS, self.plain, strict=True):
            setattr(module, name, do)

    def _counting(self, product: Callable[..., Any], weights: int) -> Callable[..., Any]:
        """A product of our own, counted: of rows and of weights or their gradients, one or a list, as many arguments later."""

        def counted(rows: torch.Tensor | list[torch.Tensor], *others: Any) -> Any:
            count = len(rows) if isinstance(rows, torch.Tensor) else len(rows[0])
            for weight in tree_leaves(others[weights]):
                self._add(2 * count * weight.numel(), set(weight.shape))
            return product(rows, *others)

        return counted

    def _layers(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """Steps of whole layers, counted: a backward step makes the gradient of what was read, and of every weight if wanted."""

        def counted(step: str, whole: layer.Whole, *places: Any) -> Any:
            width, attended, inner = whole.width, whole.linear[0].out, whole.linear[4].out
            for i in STEPS[step]:
                linear, read = whole.linear[i], (width, width, width, attended, width, width, inner)[i]
                products_of = 1 + (linear.sums is not None) if step == "backward" else 1
                self._add(2 * whole.rows * read * linear.out * products_of, {read, linear.out})
            return run(step, whole, *places)

        return counted

    def _add(self, count: int, sizes: set[int]) -> None:
        if max(sizes) > self.vocabulary // 10:  # the head's weight has its gradient made in pieces; nothing in the trunk is as large
            self.head += count
        else:
            self.trunk += count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.embedding.default:
            self.tokens[args[0].data_ptr()] += args[1].numel()
        count = _flops(func, args, kwargs or {}, out)
        if count:
            self._add(count, {size for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor) for size in x.shape})
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and tuple(made.shape) not in self.shapes and not (func.is_view or func._schema.is_mutable):
                self.largest = max(self.largest, made.numel() * made.element_size())
        return out


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func.overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    name = str(packet)
    if "linear_pointwise" in name:  # oneDNN's prepacked products: [..., k] x [n, k]
        return 2 * args[0].numel() * int(out.shape[-1])
    harmless = any(part in name for part in ("backward", "_supported", "reorder"))
    if any(part in name for part in ("mkldnn", "mkl.", "onednn", "attention", "_mm", "linear")) and not harmless:
        raise AssertionError(f"{name} is a matrix product that is not counted yet")
    return 0


@dataclass(frozen=True)
class Shape:
    """The numbers of a Llama-shaped model that its work follows from."""

    width: int
    layers: int
    linear: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        d, hidden = config.hidden_size, config.intermediate_size
        kv = d // config.num_attention_heads * config.num_key_value_heads
        return cls(d, config.num_hidden_layers, config.num_hidden_layers * (2 * d * d + 2 * d * kv + 3 * d * hidden), config.vocab_size)


@dataclass(frozen=True)
class Necessary:
    """The work of one forward pass over some groups: every prompt once, its responses behind it, the head on response tokens only.

    low counts the causal half of attention, high the whole squares (prompt on prompt, response on prompt and itself): an implementation
    may take either. again: the scores that a backward pass may make a second time rather than keep.
    """

    tokens: int
    low: float
    high: float
    again: float
    head: float

    @classmethod
    def of(cls, groups: tuple[Group, ...], shape: Shape, *, keep_last: bool = False) -> Necessary:
        """keep_last: the last token of every response is read too (a reward model reads its score there)."""
        tokens = half = whole = targets = 0
        for group in groups:
            p = len(group.prompt.tokens)
            kept = [len(r.tokens) - (not keep_last) for r in group.responses]
            tokens += p + sum(kept)
            half += p * (p + 1) // 2 + sum(r * p + r * (r + 1) // 2 for r in kept)
            whole += p * p + sum(r * (p + r) for r in kept)
            targets += sum(len(r.tokens) for r in group.responses)
        dense, pair = 2 * shape.linear * tokens, 4 * shape.width * shape.layers
        return cls(tokens, dense + pair * half, dense + pair * whole, pair / 2 * whole, 2 * targets * shape.width * shape.vocabulary)
