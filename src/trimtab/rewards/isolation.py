"""Rewards that fail on single responses: what could not be scored is marked, and the rest is scored as ever.

A reward says so itself (`Score.failure`), or `Isolated` finds out which responses its member fails on. Rewards made of others
pass failures on. `scored` then leaves out what has no score, and `FailureLimit` stops where too much fails.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

from trimtab.errors import ConfigError, RewardError, TrimtabError
from trimtab.protocols import Reward
from trimtab.types import Group, Score

T = TypeVar("T")
Rows = list[list[Score]]


class Isolated:
    """Another reward whose failures are those of single responses.

    together: the member is asked for all responses at once, and one by one only if that fails; otherwise one by one, `workers` at a time.
    timeout:  seconds for one response (a common call has so many for each). A call that takes longer goes on in its thread: Python
              cannot end it.
    retries:  how often a response is tried again.
    failed:   the total of what failed all the same: a value, or NaN (to be left out). None: the error is raised.
    """

    def __init__(
        self,
        member: Reward,
        *,
        together: bool,
        workers: int = 1,
        timeout: float | None = None,
        retries: int = 0,
        failed: float | None = math.nan,
    ) -> None:
        self.member, self.name = member, member.name
        self.together, self.workers, self.timeout, self.retries, self.failed = together, workers, timeout, retries, failed

    def score(self, groups: Sequence[Group]) -> Rows:
        singles = [group.only([i]) for group in groups for i in range(len(group.responses))]
        first = self._together(groups) if self.together else [None] * len(singles)
        if self.workers == 1:
            found = [self._settled(single, score) for single, score in zip(singles, first, strict=True)]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                found = list(pool.map(self._settled, singles, first))
        flat = iter(found)
        return [[next(flat) for _ in group.responses] for group in groups]

    def _together(self, groups: Sequence[Group]) -> list[Score | None]:
        """A common call's scores; None for every response if the call failed."""
        count = sum(len(group.responses) for group in groups)
        try:
            return [*self._call(groups, count)]
        except RewardError:
            return [None] * count

    def _settled(self, single: Group, score: Score | None) -> Score:
        """The score of one response: the one a common call gave, or what further calls give, or what stands in for it."""
        error, tries = None, self.retries + (score is None)
        while tries and (score is None or score.failure is not None):
            tries -= 1
            try:
                [score], error = self._call([single], 1), None
            except RewardError as raised:
                score, error = None, raised
        if score is not None and score.failure is None:
            return score
        reason = error.what if error else str(score and score.failure)
        if self.failed is None:
            raise error or RewardError(
                f"reward {self.name!r} failed: {reason}", where=_where(single), fix="mend it, or set reward.on_failure=exclude"
            )
        return Score(self.failed, {} if math.isnan(self.failed) else {self.name: self.failed}, failure=reason)

    def _call(self, groups: Sequence[Group], count: int) -> list[Score]:
        """The member's scores, as many as there are responses, each finite or with its failure. Raises RewardError if it failed."""
        where = _where(groups[0]) if count == 1 else f"{count} responses"
        try:
            rows = limited(lambda: self.member.score(groups), None if self.timeout is None else self.timeout * count)
        except _Abandoned as late:
            fix = "raise reward.timeout, or use a verifier of kind python, whose calls can be ended"
            raise RewardError(f"reward {self.name!r} gave no answer within {late.seconds:g} s", where=where, fix=fix) from None
        except (RewardError, ConfigError):  # the latter is the recipe's fault, and no other response would fare better
            raise
        except (Exception, SystemExit) as error:
            what = error.what if isinstance(error, TrimtabError) else f"{type(error).__name__}: {error}"
            raise RewardError(f"reward {self.name!r} raised {what}", where=where, fix="mend the reward") from error
        scores = [score for row in rows for score in row]
        if len(scores) != count:
            raise RewardError(f"reward {self.name!r} gave {len(scores)} scores for {count} responses", where=where, fix="mend the reward")
        return [self._checked(score) for score in scores]

    def _checked(self, score: Score) -> Score:
        if score.failure is None and not math.isfinite(score.total):
            return Score(math.nan, failure=f"reward {self.name!r} gave {score.total}")
        return score


class FailureLimit:
    """Another reward that stops with an explanation when more than a share of the responses scored together failed."""

    def __init__(self, member: Reward, share: float) -> None:
        self.member, self.name, self.share = member, member.name, share

    def score(self, groups: Sequence[Group]) -> Rows:
        rows = self.member.score(groups)
        failed, count = failures_of(groups, rows), sum(map(len, rows))
        if len(failed) > self.share * count:
            reasons = "; ".join(f"{n} x {reason}" for reason, n in Counter(f.reason for f in failed).most_common(3))
            raise RewardError(
                f"the reward failed on {len(failed)} of {count} responses, more than max_failures={self.share:g} allows: {reasons}",
                where=f"reward {self.name!r}, first at prompt {failed[0].prompt[:60]!r}, response {failed[0].response[:60]!r}",
                fix="mend what the reasons name, raise reward.timeout or reward.retries, or raise reward.max_failures",
            )
        return rows


class _Abandoned(Exception):
    """A call took too long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


def limited(call: Callable[[], T], seconds: float | None) -> T:
    """What a call returns or raises, if it does within so many seconds; otherwise its thread is left to itself."""
    if seconds is None:
        return call()
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(call())
        except BaseException as raised:  # also SystemExit, which would end the thread without a word
            answer.set_exception(raised)

    threading.Thread(target=work, daemon=True, name="reward call").start()
    wait([answer], timeout=seconds)
    if not answer.done():
        raise _Abandoned(seconds)
    return answer.result()


@dataclass(frozen=True)
class Failed:
    """A response that could not be scored, and why."""

    prompt: str
    response: str
    reason: str


@dataclass(frozen=True)
class Failures:
    """The responses of a step that could not be scored, among so many that were to be."""

    count: int = 0
    failed: tuple[Failed, ...] = ()

    def __add__(self, other: Failures) -> Failures:
        return Failures(self.count + other.count, self.failed + other.failed)

    def metrics(self) -> dict[str, float]:
        return {"reward/failures": float(len(self.failed)), "reward/failed_fraction": len(self.failed) / max(1, self.count)}


def failures_of(groups: Sequence[Group], scores: Sequence[Sequence[Score]]) -> list[Failed]:
    """Every failure, whether something stands in for the score or not."""
    return [
        Failed(group.prompt.as_text, response.text, score.failure)
        for group, row in zip(groups, scores, strict=True)
        for response, score in zip(group.responses, row, strict=True)
        if score.failure is not None
    ]


def scored(groups: Sequence[Group], scores: Sequence[Sequence[Score]], least: int = 1) -> tuple[list[Group], Rows, Failures]:
    """Only the responses that have a score, and what failed. A group that lost some is dropped if fewer than `least` are left."""
    kept = list(_kept(groups, scores, least))
    failures = Failures(sum(map(len, scores)), tuple(failures_of(groups, scores)))
    return [group for group, _ in kept], [row for _, row in kept], failures


def _kept(groups: Sequence[Group], scores: Sequence[Sequence[Score]], least: int) -> Iterator[tuple[Group, list[Score]]]:
    for group, row in zip(groups, scores, strict=True):
        there = [i for i, score in enumerate(row) if not score.missing]
        if len(there) == len(row):
            yield group, [*row]
        elif len(there) >= least:
            yield group.only(there), [row[i] for i in there]


def none_scored() -> RewardError:
    """The error of a step that has nothing left."""
    return RewardError(
        "the reward failed on so many responses that none is left to learn from", fix="lower reward.max_failures, and mend it"
    )


def _where(single: Group) -> str:
    return f"prompt {single.prompt.as_text[:60]!r}, response {single.responses[0].text[:60]!r}"
