"""`python -m bench`: our side beside its peers, on the same work, step by step in turn. `make bench ARGS=...` runs it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.compare import BUILD, Bench, Missing
from bench.link import ROOT, WorkerError
from bench.table import table
from bench.works import QUICK, WORKS, Work

RESULTS = ROOT / "bench" / "results"
SETTINGS = "settings.json"


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.table:
        files = [options.output / f"{name}.json" for name in options.work or WORKS]
        print(table([json.loads(file.read_text()) for file in files if file.exists()]))
        return 0
    rows = []
    works = QUICK if options.quick else WORKS
    for name in options.work or works:
        start = time.perf_counter()
        work = works.get(name, WORKS[name])
        work = work if options.model is None else replace(work, model=options.model)
        say(f"{name} against {work.peer}")
        row = measured(work, options)
        if row is not None:
            keep(row, options.output)
            rows.append(row)
        say(f"  {time.perf_counter() - start:.0f} s")
    if rows:
        print("\n" + table(rows))
    return 1 if any("failed" in row for row in rows) else 0


def measured(work: Work, options: argparse.Namespace) -> dict[str, Any] | None:
    """The row of a work; a peer that cannot be run gives a row that says why."""
    bench = Bench(say, options.lock)
    try:
        setting = setting_of(work, bench, options)
        if options.search == "only":
            return None
        return bench.compare(
            work, setting, options.steps, options.defaults, memory=not options.quick, keep=partial(keep, folder=options.output)
        )
    except (Missing, WorkerError) as error:
        say(f"  NOT MEASURED: {error}")
        return {"work": work.name, "peer": work.peer, "failed": str(error).strip().splitlines()[-1][:300]}


def setting_of(work: Work, bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """The peer's fastest setting: found before (settings.json of the output's folder, else of bench/results), or searched for now.

    A search goes on where an earlier one stopped, unless all is to be measured anew.
    """
    mine = settings(options.output)
    known = mine.get(work.name) or ({} if options.search == "only" else settings(RESULTS)).get(work.name)
    if options.search == "never" or (known is None and (options.quick or options.model)):
        return work.start
    if known is None or options.search in ("always", "only"):
        say(f"  looking for the fastest setting of {work.peer}")
        trials = known["trials"] if known and options.search == "only" else ()

        def keep_settings(found: dict[str, Any]) -> None:
            (options.output / SETTINGS).write_text(json.dumps({**mine, work.name: found}, indent=1) + "\n")

        known = bench.search(work, options.axes, options.trial_steps, trials=trials, keep=keep_settings)
        keep_settings(known)
    setting: dict[str, Any] = known["setting"]
    return setting


def keep(row: dict[str, Any], folder: Path) -> None:
    (folder / f"{row['work']}.json").write_text(json.dumps(row, indent=1) + "\n")


def settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    return json.loads(file.read_text()) if file.exists() else {}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="three works, smaller steps, two rounds, under three minutes, results in build/bench/quick"
    )
    parser.add_argument("--table", action="store_true", help="measure nothing: show the rows that were measured earlier")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), help="which rows (all)")
    parser.add_argument("--steps", type=int, help="interleaved rounds (5; with --quick 2)")
    parser.add_argument(
        "--search",
        choices=("cached", "always", "only", "never"),
        default="cached",
        help="the peer's setting: found earlier; found anew; only that, going on where a search stopped; or where a search would begin",
    )
    parser.add_argument("--axes", nargs="+", help="search only along these axes (all of the work's)")
    parser.add_argument("--trial-steps", type=int, default=2, help="steps of each trial of the search, of which the last counts")
    parser.add_argument("--defaults", type=int, help="measured steps of the peer's plain defaults (2; with --quick none)")
    parser.add_argument("--model", help="another model for all rows (tiny, 10m, 135m, 360m): results in build/bench/MODEL")
    parser.add_argument("--lock", type=Path, help="a file locked (flock) during every measurement, on a machine that is shared")
    parser.add_argument("--output", type=Path, help="folder of the JSON files (bench/results)")
    options = parser.parse_args(arguments)
    options.steps = options.steps or (2 if options.quick else 5)
    options.defaults = (0 if options.quick else 2) if options.defaults is None else options.defaults
    options.output = options.output or (BUILD / options.model if options.model else BUILD / "quick" if options.quick else RESULTS)
    return options


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
