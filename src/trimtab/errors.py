"""The errors a user can cause or meet. Each says what is wrong, where, and how to mend it.

The command line prints them as one message and exits with status 2; anything else that escapes is a bug in trimtab.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class TrimtabError(Exception):
    """An error with a place and a fix.

    what:  one sentence, what is wrong.
    where: the file and row, the setting, or the sample it concerns.
    fix:   what the user can do about it.
    samples: the prompts and responses it concerns, where a number of theirs is not finite.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, samples: Sequence[Mapping[str, Any]] = ()) -> None:
        self.what, self.where, self.fix, self.samples = what, where, fix, tuple(samples)
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        return f"{text}\n  fix: {self.fix}" if self.fix else text


class ConfigError(TrimtabError):
    """A recipe or an override is not valid."""


class DataError(TrimtabError):
    """A data file or a row of it cannot be used."""


class ModelError(TrimtabError):
    """A model cannot be loaded, is not supported, or does not fit the task."""


class RewardError(TrimtabError):
    """A reward raised, or returned something that is not one finite number per response."""


class NumericalError(TrimtabError):
    """A loss, gradient or log-probability is not finite; the optimiser step was not taken."""


class ResourceError(TrimtabError):
    """Memory has run out, and smaller pieces of work do not help."""


class RunError(TrimtabError):
    """A run directory cannot be created, read or written."""
