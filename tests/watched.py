"""The command line, telling at every instant what it does: so it can be killed there, and what it did then be read afterwards.

python tests/watched.py FILE WORDS...     FILE: two bytes, what the run does and what its writer of checkpoints does
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

START, STEP, EVALUATION, COPYING, END = "start", "step", "evaluation", "copying", "end"
IDLE, WRITING, PUBLISHING, PRUNING = "idle", "writing", "publishing", "pruning"
RUN, WRITER = (START, STEP, EVALUATION, COPYING, END), (IDLE, WRITING, PUBLISHING, PRUNING)
SAVING = (COPYING, WRITING, PUBLISHING, PRUNING)


class Watch:
    """The two bytes, shared with the process that watches."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b" if path.exists() else "w+b") as file:
            file.truncate(2)
            self.bytes = mmap.mmap(file.fileno(), 2)
        self.bytes[:] = bytes(2)

    def read(self) -> tuple[str, str]:
        run, writer = self.bytes[:]
        return RUN[run], WRITER[writer]

    def during(self, what: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """A function that says so while it runs."""
        place, value = (0, RUN.index(what)) if what in RUN else (1, WRITER.index(what))

        def watched(*arguments: Any, **named: Any) -> Any:
            before, self.bytes[place] = self.bytes[place], value
            try:
                return do(*arguments, **named)
            finally:
                self.bytes[place] = before

        return watched

    def since(self, what: str, do: Callable[..., Any]) -> Callable[..., Any]:
        """A function after whose call the run is at something else."""

        def watched(*arguments: Any, **named: Any) -> Any:
            self.bytes[0] = RUN.index(what)
            return do(*arguments, **named)

        return watched


def main() -> int:
    from trimtab import cli, snapshot
    from trimtab.training import checkpoint, fit, guards

    watch = Watch(Path(sys.argv[1]))
    hooks = fit.Hooks.__init__

    def with_evaluation(self: Any, evaluate: Any, *rest: Any) -> None:
        hooks(self, watch.during(EVALUATION, evaluate), *rest)

    fit.Hooks.__init__ = with_evaluation
    guards.Guards.begin = watch.since(STEP, guards.Guards.begin)
    checkpoint.Checkpoints.close = watch.since(END, checkpoint.Checkpoints.close)
    checkpoint.Checkpoints.save = watch.during(COPYING, checkpoint.Checkpoints.save)
    checkpoint.Checkpoints._finish = watch.during(WRITING, checkpoint.Checkpoints._finish)
    snapshot.publish = watch.during(PUBLISHING, snapshot.publish)
    snapshot.remove = watch.during(PRUNING, snapshot.remove)
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
