"""A reward that another process or machine gives, over HTTP.

    POST URL/score   {"samples": [{"prompt": ..., "response": ..., "row": {...}, "truncated": false}, ...]}
    answer           {"scores": [1.5, null, ...]}     one number per sample, in order; null: it could not be scored

What is the server's trouble (it cannot be reached, or says 408, 429, 502, 503 or 504) is waited out; what is a sample's trouble
(another error, an answer that makes no sense or comes too late) is that sample's failure.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

from trimtab import seeds
from trimtab.errors import ConfigError
from trimtab.types import Group, Score

FIRST_WAIT, LONGEST_WAIT = 0.25, 5.0
"""Seconds before the second try, and at most between two: the wait doubles, times a factor between 0.5 and 1.5."""
LARGEST_ANSWER = 1 << 24
WAITED_OUT = {408, 429, 502, 503, 504}
NOT_MENDED = {301, 302, 303, 307, 308, 401, 403, 404, 405}
"""Answers that no other sample and no patience changes: the address or the token is wrong."""


class Unavailable(Exception):
    """The server could not be asked now."""


class Refused(Exception):
    """The server was asked, and its answer is of no use."""


class Late(Refused):
    """The server was asked, and did not answer in time."""


class RemoteReward:
    """Asks a server for all scores, `per_request` at a time in `workers` requests at once. What it could not score is marked, not raised.

    timeout:     seconds for one sample; a request has so many for each of its own.
    retries:     how often a sample that the server refuses, or is too late for, is sent again.
    patience:    seconds after which a request that does not get through, or a server that answers none, is given up.
    break_after: failures in a row after which one request at a time tries, while the others wait for it.
    seed:        of the jitter in the waits, which decides nothing else.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str | None = None,
        token: str | None = None,
        workers: int = 1,
        per_request: int = 8,
        timeout: float = 60.0,
        retries: int = 0,
        patience: float = 60.0,
        break_after: int = 5,
        seed: int = 0,
    ) -> None:
        host = urlsplit(url).hostname or url
        self.url, self.name, self.token = url.rstrip("/") + "/score", name or host, token
        self.workers, self.per_request, self.timeout, self.retries, self.seed = workers, per_request, timeout, retries, seed
        self.circuit = Circuit(break_after, patience)
        proxies = [urllib.request.ProxyHandler({})] if host in ("localhost", "127.0.0.1", "::1") else []
        self.opener = urllib.request.build_opener(_NoRedirect, *proxies)

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        samples = [_sample(group, i) for group in groups for i in range(len(group.responses))]
        parts = [samples[i : i + self.per_request] for i in range(0, len(samples), self.per_request)]
        self.circuit.begin()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="remote reward") as pool:
            try:
                flat = iter([score for part in pool.map(self._part, enumerate(parts)) for score in part])
            except BaseException:
                self.circuit.end()  # nobody waits on
                raise
        return [[next(flat) for _ in group.responses] for group in groups]

    def _part(self, numbered: tuple[int, Sequence[dict[str, Any]]]) -> list[Score]:
        """The scores of one request's samples; those of a request that is refused are sent one by one."""
        number, samples = numbered
        try:
            return self._ask(number, samples)
        except Refused as refused:
            if len(samples) == 1:
                return [self._failed(str(refused))]
            return [score for sample in samples for score in self._part((number, [sample]))]
        except Unavailable as gone:
            return [self._failed(str(gone))] * len(samples)

    def _ask(self, number: int, samples: Sequence[dict[str, Any]]) -> list[Score]:
        """Send until there is an answer. Raises Refused if it is of no use, Unavailable when patience is over."""
        since, refusals = math.inf, 0  # of this request: its first failure
        for attempt in itertools.count():
            with self.circuit.turn():
                try:
                    scores = self._read(self._post(samples), len(samples))
                except Refused as refused:
                    refusals += 1
                    (self.circuit.failed if isinstance(refused, Late) else self.circuit.worked)()
                    if len(samples) > 1 or refusals > self.retries:
                        raise
                except Unavailable:
                    self.circuit.failed()
                    since = min(since, time.monotonic())
                    if self.circuit.over(since):
                        raise
                else:
                    self.circuit.worked()
                    return scores
                self.circuit.wait(self._delay(number, attempt), since)
        raise AssertionError("the loop ends by itself")

    def _delay(self, number: int, attempt: int) -> float:
        jitter = 0.5 + seeds.derive(self.seed, "reward backoff", number, attempt) / (1 << 63)
        return min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(attempt, 10)) * jitter

    def _post(self, samples: Sequence[dict[str, Any]]) -> bytes:
        body = json.dumps({"samples": samples}, default=str).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        request = urllib.request.Request(self.url, data=body, headers=headers, method="POST")
        seconds = self.timeout * len(samples)
        deadline = time.monotonic() + seconds
        try:
            with self.opener.open(request, timeout=seconds) as answer:
                text = b""
                while piece := answer.read1(1 << 16):
                    text += piece
                    if len(text) > LARGEST_ANSWER:
                        raise Refused("the server's answer is too long")
                    if time.monotonic() > deadline:
                        raise TimeoutError
                return text
        except urllib.error.HTTPError as error:
            with error:
                raise self._of_status(error.code, error) from None
        except TimeoutError:
            raise Late(f"the server did not answer within {seconds:g} s") from None
        except (OSError, HTTPException) as error:
            raise Unavailable(f"the server cannot be reached: {getattr(error, 'reason', None) or type(error).__name__}") from None

    def _of_status(self, status: int, error: urllib.error.HTTPError) -> Exception:
        if status in NOT_MENDED:
            fix = "check reward.url, and that reward.token_env names a variable with the server's token"
            return ConfigError(f"the reward server answers {status} {error.reason}", where=self.url, fix=fix)
        try:
            said = self._hidden(error.read(200).decode(errors="replace"))
        except (OSError, HTTPException):
            said = ""
        what = f"the server answered {status}: {said}".rstrip(": \n")
        return Unavailable(what) if status in WAITED_OUT else Refused(what)

    def _read(self, text: bytes, count: int) -> list[Score]:
        try:
            answer = json.loads(text)
        except ValueError:
            raise Refused("the server's answer is not JSON") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != count:
            found = f"{len(scores)} scores" if isinstance(scores, list) else "no list of scores"
            raise Refused(f"the server gave {found} for {count} sample{'s' * (count > 1)}")
        reasons = answer.get("reasons")
        said = reasons if isinstance(reasons, list) and len(reasons) == count else [None] * count
        return [self._score(score, reason) for score, reason in zip(scores, said, strict=True)]

    def _score(self, value: Any, reason: Any) -> Score:
        if value is None:
            return self._failed(self._hidden(str(reason)[:200]) if reason else "the server could not score it")
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return self._failed(f"the server gave {str(value)[:60]!r}, which is not a finite number")
        return Score(float(value), {self.name: float(value)})

    def _failed(self, reason: str) -> Score:
        return Score(math.nan, failure=f"reward {self.name!r}: {reason}")

    def _hidden(self, text: str) -> str:
        """Text without the token, should the server repeat it: reasons are written down."""
        return text.replace(self.token, "[token]") if self.token else text


class Circuit:
    """What all requests know together: how often in a row they failed, and since when. Time that is up is up for all of them."""

    def __init__(self, break_after: int, patience: float) -> None:
        self.break_after, self.patience = break_after, patience
        self.lock, self.probe, self.ended = threading.Lock(), threading.Lock(), threading.Event()
        self.begin()

    def begin(self) -> None:
        """Start afresh: another call may find the server well again."""
        self.in_row, self.since = 0, math.inf
        self.ended.clear()

    def end(self) -> None:
        self.ended.set()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Go ahead; while the circuit is broken, only one at a time does. Raises Unavailable if patience is over already."""
        held = False
        if self.in_row >= self.break_after:
            self.probe.acquire()
            held = self.in_row >= self.break_after
            if not held:
                self.probe.release()
        try:
            if self.over(math.inf):
                raise Unavailable(f"the server was not to be reached for {self.patience:g} s")
            yield
        finally:
            if held:
                self.probe.release()

    def failed(self) -> None:
        with self.lock:
            self.in_row, self.since = self.in_row + 1, min(self.since, time.monotonic())

    def worked(self) -> None:
        with self.lock:
            self.in_row, self.since = 0, math.inf

    def over(self, since: float) -> bool:
        """Whether patience is over: with the server, or with a request that has failed since then."""
        now, broken = time.monotonic(), self.in_row >= self.break_after
        return self.ended.is_set() or now - since >= self.patience or (broken and now - self.since >= self.patience)

    def wait(self, seconds: float, since: float) -> None:
        """A pause, no longer than there is patience left."""
        left = min(since, self.since) + self.patience - time.monotonic()
        self.ended.wait(max(0.0, min(seconds, left)))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the token to another address."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _sample(group: Group, index: int) -> dict[str, Any]:
    """One sample as the server gets it; a prompt of chat turns stays one."""
    prompt, response = group.prompt, group.responses[index]
    text = prompt.text if isinstance(prompt.text, str) else [dict(turn) for turn in prompt.text]
    return {"prompt": text, "response": response.text, "row": dict(prompt.row), "truncated": response.truncated}
