"""The next rollout beside the update: a copy of the policy samples in a thread of its own while the trainer learns.

    trainer    look 0, update 0 | look 1, update 1 | look 2, update 2
    sampler 0 |       1         |        2         |        3             rollout k + 1 is drawn by the policy before update k

So what is learnt from was sampled one update ago (from step 1 on), which `algorithm.mismatch` corrects: the weight pi_old / pi_sampler.
The sampler gets new weights only between two steps, when nothing is being sampled: the same seed gives the same run, bit for bit.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from typing import Any, Generic, TypeVar

from trimtab.models.language import LanguageModel
from trimtab.rewards.isolation import Failed, Failures
from trimtab.training.clock import Clock
from trimtab.types import Group, Prompt, Response, Score

T = TypeVar("T")
Sampled = tuple[list[Group], list[list[Score]], int, Failures]
"""Groups, their scores, how many groups were dropped because they teach nothing, and what could not be scored."""


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
        self._waited = 0.0

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

    def pending(self) -> tuple[int, T] | None:
        """The rollout that is begun, when it is done, and its step."""
        start = time.perf_counter()
        pending = None if self.begun is None else (self.begun[0], self.begun[1].result())
        self._waited += time.perf_counter() - start
        return pending

    def waited(self) -> float:
        """Seconds waited for what is pending since this was last asked."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def begin_with(self, step: int, rollout: T) -> None:
        """Have the rollout of a step already: it was made before the run was resumed."""
        done: Future[T] = Future()
        done.set_result(rollout)
        self.begun = step, done

    def wait(self) -> None:
        """Until nothing is being sampled."""
        if self.begun is not None:
            self.begun[1].exception()

    def close(self) -> None:
        """End the thread, after what it has begun."""
        self.worker.shutdown(cancel_futures=True)


class Begun:
    """The rollout that is begun, as part of a checkpoint: the weights it was drawn with are gone by then."""

    def __init__(self, overlap: Overlap[tuple[Sampled, Clock]]) -> None:
        self.overlap = overlap

    def state_dict(self) -> dict[str, Any]:
        pending = self.overlap.pending()
        if pending is None:
            return {"step": None}
        step, ((groups, scores, dropped, failures), _) = pending
        return {
            "step": step,
            "groups": [
                {"prompt": _fields(group.prompt), "responses": [_fields(response) for response in group.responses]} for group in groups
            ],
            "scores": [[_fields(score) for score in row] for row in scores],
            "dropped": dropped,
            "failures": {"count": failures.count, "failed": [_fields(failed) for failed in failures.failed]},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.overlap.wait()
        self.overlap.begun = None
        if state["step"] is None:
            return
        groups = [
            Group(_made(Prompt, saved["prompt"]), tuple(_made(Response, response) for response in saved["responses"]))
            for saved in state["groups"]
        ]
        scores = [[_made(Score, score) for score in row] for row in state["scores"]]
        failures = Failures(state["failures"]["count"], tuple(_made(Failed, failed) for failed in state["failures"]["failed"]))
        self.overlap.begin_with(state["step"], ((groups, scores, state["dropped"], failures), Clock()))


def _fields(record: Any) -> dict[str, Any]:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _made(kind: Any, saved: Mapping[str, Any]) -> Any:
    """A record from JSON, whose lists are tuples again."""
    return kind(**{name: _tuples(value) for name, value in saved.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
