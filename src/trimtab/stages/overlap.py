"""The next rollout beside the update: a copy of the policy samples in a thread of its own while the trainer learns.

    trainer    look 0, update 0 | look 1, update 1 | look 2, update 2
    sampler 0 |       1         |        2         |        3             rollout k + 1 is drawn by the policy before update k

So what is learnt from was sampled one update ago (from step 1 on), which `algorithm.mismatch` corrects: the weight pi_old / pi_sampler.
The sampler gets new weights only between two steps, when nothing is being sampled: the same seed gives the same run, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from trimtab.models.language import LanguageModel

T = TypeVar("T")


def second(policy: LanguageModel) -> LanguageModel:
    """A copy of the policy to sample from; what is not trained is shared, so that with an adapter it costs next to nothing."""
    shared = {id(p): p for p in policy.model.parameters() if not p.requires_grad}
    copied: LanguageModel = copy.deepcopy(policy, memo=shared)
    copied.model.requires_grad_(False)
    return copied


class Overlap(Generic[T]):
    """Makes the rollout of the next step beside this one.

    make:    the rollout of a step, with the weights the sampler has.
    refresh: gives the sampler the policy's weights as they are at the start of a step.
    """

    def __init__(self, make: Callable[[int], T], refresh: Callable[[int], None]) -> None:
        self.make, self.refresh = make, refresh
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="rollout")
        self.begun: tuple[int, Future[T]] | None = None

    def take(self, step: int, *, more: bool) -> T:
        """The rollout of a step: the one begun before, or (at the first step) one made now. With `more`, the next one is begun."""
        if self.begun is not None and self.begun[0] == step:
            rollout = self.begun[1].result()
            self.refresh(step)
        else:
            self.wait()
            self.refresh(step)
            rollout = self.make(step)
        self.begun = (step + 1, self.worker.submit(self.make, step + 1)) if more else None
        return rollout

    def wait(self) -> None:
        """Until nothing is being sampled."""
        if self.begun is not None:
            self.begun[1].exception()

    def close(self) -> None:
        """End the thread, after what it has begun."""
        self.worker.shutdown(cancel_futures=True)
