"""A run that is to be replaced: set aside beside its place, dropped once the new one has taken a step, brought back if it never does.

.NAME-replaced-PID   an earlier run, until the new one at NAME has something of its own; locked by the process that set it aside
.NAME-dropped-TIME   one that is being removed
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCKS = fcntl is not None
"""Whether this system has locks on files."""
LOCK = ".lock"
"""The file in a run's folder that the process which works there has locked."""


@dataclass
class Aside:
    """A run set aside: where it lies, where it belongs, and its lock: whoever can take that knows that this process is no more."""

    path: Path
    home: Path
    held: IO[str] | None

    @classmethod
    def set(cls, home: Path, held: IO[str] | None) -> Aside:
        """Set aside the run that lies at home, whose lock this process holds."""
        path = home.with_name(f".{home.name}-replaced-{os.getpid()}")
        home.rename(path)
        return cls(path, home, held)

    def bring_back(self) -> None:
        """To its place, from which what lies there is removed, all but the failures: the error that ends that run speaks of them."""
        if (self.home / "failures").is_dir():
            shutil.rmtree(self.path / "failures", ignore_errors=True)
            (self.home / "failures").rename(self.path / "failures")
        if self.home.exists():
            _drop(self.home, self.home.name, keep=self.path)
        else:
            self.path.rename(self.home)
        self.let_go()

    def drop(self) -> None:
        """Remove it. Where that fails it stays, and the next start says so."""
        with suppress(OSError):
            _drop(self.path, self.home.name)
        self.let_go()

    def keep(self) -> None:
        """Leave it where it is, and say so."""
        print(f"{self.path}: an earlier run, which was to be replaced; it is kept until you remove it", file=sys.stderr)
        self.let_go()

    def let_go(self) -> None:
        """Give up its lock."""
        if self.held is not None:
            self.held.close()
            self.held = None


def left(home: Path) -> Iterator[Aside]:
    """The runs that were set aside for one here by processes that are no more, newest first; each is locked."""
    found = [path for path in home.parent.glob(f".{escape(home.name)}-replaced-*") if (path / "config.yaml").is_file()]
    for path in sorted(found, key=lambda path: path.stat().st_ctime, reverse=True):
        held = locked(path)
        if held is not None:
            yield Aside(path, home, held)


def sweep(home: Path) -> None:
    """Remove what a killed process was removing."""
    for dropped in home.parent.glob(f".{escape(home.name)}-dropped-*"):
        shutil.rmtree(dropped, ignore_errors=True)


def locked(folder: Path) -> IO[str] | None:
    """A folder's lock, held until it is closed or the process ends; None where another process holds it (or there are no locks)."""
    if fcntl is None:
        return None
    held = (folder / LOCK).open("w")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        return None
    return held


def _drop(folder: Path, name: str, *, keep: Path | None = None) -> None:
    """Remove a folder, which loses its name first: what an end in the middle leaves is not mistaken for a run. keep: takes its place."""
    nameless = folder.with_name(f".{name}-dropped-{time.time_ns()}")
    folder.rename(nameless)
    if keep is not None:
        keep.rename(folder)
    shutil.rmtree(nameless, ignore_errors=True)
