"""A plain Python function as a reward."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, RewardError
from trimtab.types import Group, Score


class FunctionReward:
    """Calls `function(prompt, response, row) -> float` for every response: prompt and response as text, row as a mapping.

    With `batched`, calls `function(prompts, responses, rows) -> list of floats` once for all; with `workers`, so many calls at a time,
    each in a thread. Whatever goes wrong in it is a RewardError that shows the sample and the function's own traceback line. With
    `tolerant`, a value that is no finite number is the failure of its sample alone.
    """

    def __init__(
        self, function: Callable[..., Any], *, name: str | None = None, batched: bool = False, workers: int = 1, tolerant: bool = False
    ) -> None:
        self.function, self.batched, self.workers, self.tolerant = function, batched, workers, tolerant
        self.name: str = name or str(getattr(function, "__name__", "reward"))

    def score(self, groups: Sequence[Group]) -> list[list[Score]]:
        samples = [(g.prompt.as_text, r.text, g.prompt.row) for g in groups for r in g.responses]
        if self.batched:
            scores = self._all(samples)
        elif self.workers == 1:
            scores = [self._one(sample) for sample in samples]
        else:
            with ThreadPoolExecutor(self.workers) as pool:
                scores = list(pool.map(self._one, samples))
        flat = iter(scores)
        return [list(itertools.islice(flat, len(g.responses))) for g in groups]

    def _one(self, sample: tuple[str, str, Any]) -> Score:
        return self._score(self._call(*sample, where=_where(sample)), sample)

    def _all(self, samples: list[tuple[str, str, Any]]) -> list[Score]:
        columns = [list(column) for column in zip(*samples, strict=True)]
        returned = self._call(*columns, where=f"a batch of {len(samples)} responses")
        try:
            values = list(returned)
        except TypeError:
            raise RewardError(
                f"reward {self.name!r} returned {type(returned).__name__}, not a list of {len(samples)} numbers",
                fix="return one number per response, or set reward.batched=false",
            ) from None
        if len(values) != len(samples):
            raise RewardError(
                f"reward {self.name!r} returned {len(values)} scores for {len(samples)} responses",
                fix="return one number per response, in order",
            )
        return [self._score(value, sample) for value, sample in zip(values, samples, strict=True)]

    def _call(self, *arguments: Any, where: str) -> Any:
        try:
            return self.function(*arguments)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})",
                where=where,
                fix="mend the function; it is called as function(prompt, response, row)" if not self.batched else "mend the function",
            ) from error

    def _score(self, value: Any, sample: tuple[str, str, Any]) -> Score:
        try:
            number = self._number(value, sample)
        except RewardError as error:
            if not self.tolerant:
                raise
            return Score(math.nan, failure=error.what)
        return Score(number, {self.name: number})

    def _number(self, value: Any, sample: tuple[str, str, Any]) -> float:
        where = _where(sample)
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise RewardError(
                f"reward {self.name!r} returned {value!r}, which is not a number", where=where, fix="return a float"
            ) from None
        if not math.isfinite(number):
            raise RewardError(
                f"reward {self.name!r} returned {number}",
                where=where,
                fix="return a finite number, for instance by clipping",
                samples=[{"prompt": sample[0], "response": sample[1], "numbers": {self.name: []}}],
            )
        return number


def load_function(spec: str, *, where: str = "reward.function") -> Callable[..., Any]:
    """The function named by "file.py:name" or "package.module:name"."""
    place, colon, name = spec.rpartition(":")
    if not colon:
        raise ConfigError(f"{spec!r} does not name a function", where=where, fix="write file.py:name or package.module:name")
    try:
        if place.endswith(".py"):
            path = Path(place)
            if not path.is_file():
                raise ConfigError(f"there is no file {place}", where=where, fix="check the path; it is relative to the working folder")
            loader = importlib.util.spec_from_file_location(path.stem, path)
            assert loader is not None
            assert loader.loader is not None
            module = importlib.util.module_from_spec(loader)
            sys.modules.setdefault(path.stem, module)
            loader.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{place} cannot be imported: {type(error).__name__}: {error}", where=where, fix="mend the module") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise ConfigError(f"{place} has no function {name!r}", where=where, fix=f"it has: {known or 'none'}")
    return function  # type: ignore[no-any-return]


def _where(sample: tuple[str, str, Any]) -> str:
    return f"prompt {sample[0][:60]!r}, response {sample[1][:60]!r}"
