"""A stage's run from start to end: its directory, progress, other trackers, and the report at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from trimtab import __version__
from trimtab.runs.directory import RunDirectory
from trimtab.runs.progress import Progress
from trimtab.runs.report import write_report
from trimtab.runs.trackers import make


@contextmanager
def session(
    stage: str, output: str, config_yaml: str, *, trackers: Sequence[str] = (), overwrite: bool = False, resume: bool = False
) -> Iterator[RunDirectory]:
    """Open a run directory for a stage; whatever way it ends, its report is written if there is anything to report."""
    path, step = Path(output), None
    if resume:
        directory, step = RunDirectory.resume(path, config_yaml)
    else:
        directory = RunDirectory.create(path, config_yaml, overwrite=overwrite)
    try:
        with directory:
            directory.trackers = [Progress(stage), *make(trackers, path, path.name, yaml.safe_load(config_yaml))]
            if step is None:
                directory.event("started", stage=stage, trimtab=__version__)
            else:
                directory.event("resumed", stage=stage, trimtab=__version__, step=step)
            yield directory
    finally:
        if (path / "metrics.jsonl").exists() and (path / "metrics.jsonl").stat().st_size:
            try:
                write_report([path], path / "report.html")
            except OSError as error:  # the run itself matters more
                print(f"the report could not be written: {error.strerror}", file=sys.stderr)
