"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Seconds spent in the named parts of a step, which may come more than once."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.parts: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.parts[f"time/{part}"] = self.parts.get(f"time/{part}", 0.0) + time.perf_counter() - start

    def before(self, part: str, seconds: float) -> None:
        """Count seconds that passed before the step was begun as its own."""
        self.start -= seconds
        self.parts[f"time/{part}"] = self.parts.get(f"time/{part}", 0.0) + seconds

    @property
    def seconds(self) -> dict[str, float]:
        return {**self.parts, "time/step": time.perf_counter() - self.start}
