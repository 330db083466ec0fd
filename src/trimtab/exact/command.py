"""`trimtab exact`: run the lab, print what it found, draw the frontier; the exit status says whether everything held."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.algorithms import ALGORITHMS
from trimtab.errors import ConfigError
from trimtab.exact.cases import BETA, TABLES, cases
from trimtab.exact.lab import Result, run_all
from trimtab.exact.pairs import FLAT, PairsResult, flatness, pairs_cases

COLUMNS = ("algorithm", "KL is", "policy", "task", "seed", "J*", "J", "gap", "bar", "E r", "KL", "")


def exact(words: Sequence[str]) -> int:
    """Returns 0 if every method did what it should, else 1."""
    options = _options(words)
    chosen = list(cases(quick=options.quick, algorithm=options.algorithm))
    with_pairs = options.algorithm in (None, "dpo")
    pairs = list(pairs_cases(quick=options.quick)) if with_pairs else []
    results: list[Result] = []
    learned: list[PairsResult] = []
    for result in run_all([*chosen, *pairs]):
        if isinstance(result, PairsResult):
            learned.append(result)
        else:
            results.append(result)
        print(_line(result), file=sys.stderr, flush=True)
    order = {(c.algorithm, c.kl, c.policy, c.task.name, c.seed, c.settings): i for i, c in enumerate(chosen)}
    results.sort(key=lambda r: next(i for key, i in order.items() if key[:5] == (r.algorithm, r.kl, r.policy, r.task, r.seed)))
    learned.sort(key=lambda r: (r.method, r.pairs, r.seed))
    flat = flatness(learned) if learned else {}
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [asdict(result) for result in results]
    (options.output / "results.json").write_text(json.dumps({"policies": rows, "pairs": _pair_rows(learned, flat)}, indent=1) + "\n")
    if results:
        _draw(results, options.output / "frontier.png")
    if options.json:
        print(json.dumps([*rows, *_pair_rows(learned, flat)]))
    else:
        _tables(results, learned, flat)
        print(f"written: {options.output / 'results.json'}, {options.output / 'frontier.png'}")
    return 0 if all(r.ok for r in results) and all(x < FLAT for x in flat.values()) else 1


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="trimtab exact",
        description="Run every algorithm through the real stages on tasks whose responses can all be listed, and hold it against the "
        "exact optimum J* = beta log Z.",
    )
    parser.add_argument("--algorithm", metavar="A", help="only this one: a policy algorithm, or dpo for learning from pairs")
    parser.add_argument("--json", action="store_true", help="print a list of cases as JSON")
    parser.add_argument("--quick", action="store_true", help="one seed, one task")
    parser.add_argument("--output", type=Path, default=Path("runs/exact"), help="folder for results.json and frontier.png")
    options = parser.parse_args(list(words))
    if options.algorithm not in (None, "dpo", *ALGORITHMS):
        raise ConfigError(
            f"the lab knows no algorithm {options.algorithm!r}", where="--algorithm", fix=f"one of {', '.join([*ALGORITHMS, 'dpo'])}"
        )
    return options


def _line(result: Result | PairsResult) -> str:
    if isinstance(result, PairsResult):
        return f"{result.method:13} {result.pairs:6} pairs, seed {result.seed}: N * gap {result.n_gap:.1f}"
    verdict = "" if result.ok else "  FAILED"
    return f"{result.algorithm:13} {result.kl}, {result.policy}, {result.task}, seed {result.seed}: gap {result.gap:.5f}{verdict}"


def _pair_rows(learned: Iterable[PairsResult], flat: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "algorithm": r.method, "kl": "implied", "policy": "tabular", "task": f"{r.pairs} pairs", "seed": r.seed, "optimum": r.optimum,
            "value": r.optimum - r.gap, "gap": r.gap, "reference_gap": r.reference_gap, "bar": None, "ok": flat[r.method] < FLAT,
            "pairs": r.pairs, "n_gap": r.n_gap, "expected_n_gap": r.expected_n_gap, "flatness": flat[r.method],
        }
        for r in learned
    ]  # fmt: skip


def _tables(results: Sequence[Result], learned: Sequence[PairsResult], flat: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=max(150, Console().width))
    table = Table(*COLUMNS, title=f"J = E r - beta KL, beta = {BETA}; gap = J* - J", title_justify="left")
    for r in results:
        sign = "" if r.bar is None else f"{'>' if r.expects == 'biased' else '<'} {r.bar:.2g}"
        numbers = (f"{r.optimum:.4f}", f"{r.value:.4f}", f"{r.gap:.5f}", sign, f"{r.reward:.3f}", f"{r.divergence:.3f}")
        verdict = "FAILED" if not r.ok else {"exact": "met", "biased": "biased, as expected", "seen": ""}[r.expects]
        table.add_row(r.algorithm, r.kl, r.policy, r.task, str(r.seed), *numbers, verdict)
    if results:
        console.print(table)
        console.print(f"largest error of J* - J = beta KL(pi || pi*): {max(r.identity_error for r in results):.1e}")
        console.print(f"nearest to the exact reward-KL frontier, from below: {-max(r.above for r in results):.1e}")
    if learned:
        pairs = Table(
            "method", "pairs N", "runs", "mean gap", "mean N * gap", "expected", title="learning from N noisy pairs", title_justify="left"
        )
        for method, size in sorted({(r.method, r.pairs) for r in learned}):
            own = [r for r in learned if (r.method, r.pairs) == (method, size)]
            mean = sum(r.gap for r in own) / len(own)
            pairs.add_row(method, str(size), str(len(own)), f"{mean:.5f}", f"{mean * size:.1f}", f"{own[0].expected_n_gap:.1f}")
        console.print(pairs)
        console.print(
            "largest over smallest N * gap, or its expectation: " + ", ".join(f"{m} {x:.2f}" for m, x in flat.items()) + f" (bar {FLAT:g})"
        )


def _draw(results: Sequence[Result], file: Path) -> None:
    """The frontier of the first task, with a point for every placement of the KL and one for all that are exact."""
    from trimtab.exact.frontier import frontier
    from trimtab.exact.task import exact_logprobs
    from trimtab.runs.charts import Point, frontier_png

    own = [r for r in results if r.task == TABLES[0].name and r.policy == "tabular" and r.seed == 0]
    if not own:
        return
    reference = exact_logprobs(TABLES[0], TABLES[0].start("tabular", 0))
    curve = frontier(TABLES[0], reference)
    named: dict[str, Result] = {}
    for r in own:
        exact = r.expects == "exact" and r.kl == "k1 in the reward"
        if exact or r.kl != "k1 in the reward":
            named.setdefault("k1 in the reward (the optimum)" if exact else r.kl, r)
    start = float((reference.exp() * TABLES[0].reward_table).sum(1).mean())
    points = [Point("reference", 0.0, start, start, start)]
    points += [Point(name, r.divergence, r.reward, r.reward, r.reward) for name, r in named.items()]
    frontier_png(points, ([kl for kl, _ in curve], [reward for _, reward in curve]), file, reward=f"E[r], task {TABLES[0].name!r}")
