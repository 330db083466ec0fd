"""Random numbers without random state: every draw has its own seed, made from the run's seed, a purpose and a step.

Nothing has to be saved for a run to continue exactly, and what one part of a run draws never shifts what another draws.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, purpose: str, *steps: int) -> int:
    """A 63-bit seed for one purpose at one step."""
    text = ":".join([str(seed), purpose, *map(str, steps)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: str, *steps: int) -> torch.Generator:
    """A torch generator so seeded."""
    import torch

    return torch.Generator().manual_seed(derive(seed, purpose, *steps))
