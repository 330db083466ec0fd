"""Memory that is used in turns: gradients while an update adds them up, a sampler's weights while it draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor

Empty = Callable[[int, int], Float[Tensor, "rows columns"]]
"""Makes an array of bfloat16 whose numbers are yet to be written."""

_LINE = 16
"""Numbers of a cache line: arrays begin with one."""


class Scratch:
    """Float32 zeros for the gradients of the largest of several sets of parameters, those in bfloat16 and float16.

    Optimisers whose updates never overlap add up their gradients in the same one, because each leaves zeros behind. Between updates it
    may be lent. Parameters in float32 have their gradients from autograd, and no place here.
    """

    def __init__(self, *sets: Mapping[str, Tensor]) -> None:
        rounded = [_rounded(parameters) for parameters in sets]
        devices = [parameter.device for parameters in rounded for parameter in parameters.values()]
        self.zeros = torch.zeros(max((_places(p)[-1] for p in rounded), default=0), device=devices[0] if devices else None)
        self.lent = 0

    def gradients(self, parameters: Mapping[str, Tensor]) -> dict[str, Float[Tensor, ...]]:
        """Where those of a set are added up."""
        rounded = _rounded(parameters)
        return {
            name: self.zeros[at : at + p.numel()].view(p.shape) for at, (name, p) in zip(_places(rounded), rounded.items(), strict=False)
        }

    def lend(self) -> Empty:
        """What makes arrays here while there is room, and elsewhere from then on. They are lost when it lends or takes back again."""
        self.take_back()
        room = self.zeros.view(torch.bfloat16)

        def empty(rows: int, columns: int) -> Tensor:
            start = -(-self.lent // (2 * _LINE)) * 2 * _LINE
            end = start + rows * columns
            if room.device.type != "cpu" or end > len(room):
                return elsewhere(rows, columns)
            self.lent = end
            return room[start:end].view(rows, columns)

        return empty

    def take_back(self) -> None:
        """Zeros again, where something was lent."""
        self.zeros[: -(-self.lent // 2)].zero_()
        self.lent = 0


def elsewhere(rows: int, columns: int) -> Float[Tensor, "rows columns"]:
    """An array of its own."""
    return torch.empty(rows, columns, dtype=torch.bfloat16)


def _rounded(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in parameters.items() if parameter.dtype in (torch.bfloat16, torch.float16)}


def _places(parameters: Mapping[str, Tensor]) -> list[int]:
    """Where each begins, and the end."""
    return list(accumulate((-(-parameter.numel() // _LINE) * _LINE for parameter in parameters.values()), initial=0))
