"""What a run does about steps that go wrong: leave out those with numbers that are not finite, and go back before a spike.

step fails:   RUN/failures/step-N.jsonl names the samples; the step is left out while `skip` lasts, else the run stops
step spikes:  loss or KL > factor x median of |the last `window`|: back to the newest checkpoint, learning rate x `backoff`
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from pydantic import Field

from trimtab.config import Config
from trimtab.errors import NumericalError, TrimtabError
from trimtab.protocols import Tracker
from trimtab.training.optimiser import Optimiser


class GuardsConfig(Config):
    """When a step is left out or taken back. The defaults stop at the first number that is not finite, and call nothing a spike."""

    skip: int = Field(0, ge=0, description="how many steps with a number that is not finite a run may leave out before it stops")
    loss_spike: float | None = Field(None, gt=1, description="a loss above this many times its running median is a spike (null: never)")
    kl_spike: float | None = Field(None, gt=1, description="the same for the KL to the reference (policy runs)")
    window: int = Field(20, gt=1, description="steps that the running median is over; there is no spike before there are so many")
    backoff: float = Field(0.5, gt=0, lt=1, description="after a spike the learning rate is multiplied by this")
    rollbacks: int = Field(3, ge=0, description="how many spikes are gone back from; at the next one the run stops")


class Guards:
    """The guards of one run. Counts, learning-rate factor and running medians are part of its checkpoints."""

    def __init__(self, run: Path, config: GuardsConfig, tracker: Tracker, optimisers: Sequence[Optimiser]) -> None:
        self.failures, self.config, self.tracker, self.optimisers = run / "failures", config, tracker, optimisers
        self.skipped, self.rolled_back, self.lr_factor = 0, 0, 1.0
        self.history: dict[str, list[float]] = {"loss": [], "kl": []}
        self.spike: dict[str, Any] | None = None
        self._step, self._failed = 0, False

    @property
    def watching(self) -> bool:
        """Whether there can be a spike to go back from."""
        return self.config.loss_spike is not None or self.config.kl_spike is not None

    def begin(self, step: int) -> None:
        """Before a step (counted from 0)."""
        self._step, self._failed, self.spike = step, False, None

    @contextmanager
    def skipping(self) -> Iterator[None]:
        """What fails in here because of samples is left out, as long as there is budget; they are written down in any case."""
        try:
            yield
        except TrimtabError as error:
            if not error.samples:
                raise
            path = self._write(error.samples)
            if self.skipped >= self.config.skip:
                before = f" ({self.skipped} were left out before: guards.skip={self.config.skip})" if self.config.skip else ""
                what = f"{error.what}{before}; the samples are in {path}"
                raise type(error)(what, where=error.where, fix=error.fix, samples=error.samples) from error
            self.skipped += 1
            self.tracker.event("step skipped", step=self._step, error=str(error), samples=str(path), left_out=self.skipped)

    def see(self, *, loss: float | None = None, kl: float | None = None) -> None:
        """What a step's loss and KL were. A spike is noted, and does not enter the running median."""
        for name, value, factor in (("loss", loss, self.config.loss_spike), ("kl", kl, self.config.kl_spike)):
            if factor is None or value is None:
                continue
            known = self.history[name]
            median = statistics.median(map(abs, known)) if len(known) >= self.config.window else None
            if median is not None and value > factor * median:
                self.spike = {"number": name, "value": value, "median": median}
            else:
                self.history[name] = [*known, value][-self.config.window :]

    def go_back(self, step: int, restore: Callable[[], int]) -> int:
        """From a spike at a step to the newest checkpoint, with a lower learning rate; returns the steps that are taken there.

        Raises NumericalError if the run has gone back often enough.
        """
        assert self.spike is not None
        if self.rolled_back >= self.config.rollbacks:
            raise NumericalError(
                f"the {self.spike['number']} of step {step} is {self.spike['value']:.4g}, its running median {self.spike['median']:.4g}; "
                f"the run has gone back {self.rolled_back} times before",
                where="guards",
                fix="lower the learning rate or raise the factor, then `trimtab resume RUN ... --allow-changed`",
            )
        spike, rolled_back, lr_factor = self.spike, self.rolled_back + 1, self.lr_factor * self.config.backoff
        to = restore()  # the state of these guards too, as it was then
        self._set(self.skipped, rolled_back, lr_factor)
        self.tracker.rewind(to)
        self.tracker.event("rolled back", step=step, to=to, lr_factor=lr_factor, rollbacks=rolled_back, **spike)
        return to

    def metrics(self) -> dict[str, float]:
        """What is logged with every step, where the guards are on."""
        skipped = {"guard/skipped": float(self.skipped)} if self.config.skip else {}
        return skipped | ({"guard/rollbacks": float(self.rolled_back), "guard/lr_factor": self.lr_factor} if self.watching else {})

    def state_dict(self) -> dict[str, Any]:
        history = dict(self.history)  # what is seen later makes new lists
        return {"skipped": self.skipped, "rolled_back": self.rolled_back, "lr_factor": self.lr_factor, "history": history}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history = {name: list(values) for name, values in state["history"].items()}
        self._set(state["skipped"], state["rolled_back"], state["lr_factor"])

    def _set(self, skipped: int, rolled_back: int, lr_factor: float) -> None:
        self.skipped, self.rolled_back, self.lr_factor = skipped, rolled_back, lr_factor
        for optimiser in self.optimisers:
            optimiser.lr_factor = lr_factor

    def _write(self, samples: Sequence[Mapping[str, Any]]) -> Path:
        """Write samples to the file of this step, which a step begins anew."""
        self.failures.mkdir(parents=True, exist_ok=True)
        path = self.failures / f"step-{self._step:06d}.jsonl"
        with path.open("a" if self._failed else "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(json.dumps({"step": self._step, **row}, ensure_ascii=False) + "\n" for row in samples)
        self._failed = True
        return path


def skipping(guards: Guards | None) -> AbstractContextManager[None]:
    """`guards.skipping()` where there are guards; without, whatever fails is raised."""
    return nullcontext() if guards is None else guards.skipping()
