"""Reports: one self-contained HTML page from a run's files, or from several runs side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import RunError
from trimtab.runs.directory import RunDirectory
from trimtab.runs.trackers import flatten

GROUPS = {
    "reward": "Reward", "kl": "KL to the reference", "loss": "Loss", "train": "On the training data", "eval": "Held-out",
    "policy": "Policy", "critic": "Critic", "response": "Responses", "advantage": "Advantages", "logprob": "Log-probabilities",
    "sampler": "Sampler", "optim": "Optimiser", "progress": "Progress",
}  # fmt: skip
"""Sections by the first part of a metric's name, in this order; others follow."""


@dataclass
class Section:
    """One part of a page: charts, a table, or samples under a heading. `text` tables are set left."""

    title: str
    note: str = ""
    charts: list[tuple[str, str]] = field(default_factory=list)
    wide: bool = False
    table: dict[str, Any] | None = None
    text: bool = False
    strong: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Page:
    """What the template shows."""

    title: str
    subtitle: str
    tiles: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)


def write_report(paths: Sequence[Path], output: Path) -> Path:
    """The report of one run, or a comparison of several. Raises RunError for a folder that is no run."""
    runs = [RunDirectory.open(path) for path in paths]
    if not runs:
        raise RunError("no run was named", fix="name at least one run directory")
    return write_page(one_run(runs[0]) if len(runs) == 1 else comparison(runs), output)


def write_page(page: Page, output: Path) -> Path:
    """Render a page to a file, whole or not at all."""
    from jinja2 import Environment, PackageLoader

    environment = Environment(loader=PackageLoader("trimtab", "runs"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("report.html.j2").render(page=page)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}")
    staging.write_text(html, encoding="utf-8")
    os.replace(staging, output)
    return output


def one_run(run: RunDirectory) -> Page:
    """Everything one run has to say."""
    metrics, events = run.metrics(), run.events()
    started = next((event for event in events if event["event"] == "started"), {})
    ended = next((event["event"] for event in reversed(events) if event["event"] in ("finished", "interrupted", "failed")), "not finished")
    config = run.config()
    model = (config.get("model") or {}).get("path", "")
    subtitle = f"{started.get('stage', 'run')} on {model}, seed {config.get('seed', 0)}: {len(metrics)} steps, {ended}"
    page = Page(run.path.name, subtitle, tiles(metrics))
    page.sections += picture(metrics)
    page.sections += curve_sections([(run.path.name, metrics)])
    page.sections += samples_section(run.sample_rows())
    page.sections += timing(metrics)
    page.details = [
        ("Recipe", yaml.safe_dump(config, sort_keys=False, allow_unicode=True)),
        ("Events", "\n".join(_event(event) for event in events)),
    ]
    return page


def comparison(runs: Sequence[RunDirectory]) -> Page:
    """Several runs side by side: final values, differing settings, and curves in one chart each."""
    names = _distinct([run.path for run in runs])
    series = list(zip(names, (run.metrics() for run in runs), strict=True))
    page = Page("Comparison", ", ".join(names))
    shown = [name for name in _names(series) if not name.startswith("time/")]
    rows = [[name, *(_number(metrics[-1].get(name)) if metrics else "" for _, metrics in series)] for name in shown]
    page.sections.append(Section("Final values", table={"head": ["metric", *names], "rows": rows}))
    flat = [flatten(run.config()) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({str(settings.get(key)) for settings in flat}) > 1]
    rows = [[key, *(str(settings.get(key, "")) for settings in flat)] for key in differing]
    page.sections.append(Section("Settings that differ", table={"head": ["setting", *names], "rows": rows}, text=True))
    page.sections += curve_sections(series)
    return page


def tiles(metrics: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """The few numbers that sum a run up."""
    if not metrics:
        return []
    first, last = metrics[0], metrics[-1]
    wanted = (
        "reward/mean",
        "kl/mean",
        "eval/accuracy",
        "eval/nll",
        "loss/nll",
        "loss/pair",
        "loss/dpo",
        "train/accuracy",
        "response/length",
    )
    made = [(f"{_number(first[name])} → {_number(last[name])}", name) for name in wanted if name in first and name in last]
    made += [(_number(last[name]), name) for name in wanted if name in last and name not in first]
    return made[:5]


def picture(metrics: Sequence[dict[str, Any]]) -> list[Section]:
    """Reward against KL, where a run has both."""
    from trimtab.runs.charts import reward_kl

    x, y = _column(metrics, "kl/mean"), _column(metrics, "reward/mean")
    if len(x) < 2 or len(x) != len(y):
        return []
    note = "Each dot is one rollout batch, later ones darker. What was gained, and what was paid for it."
    return [Section("Reward against KL", note, charts=[("", reward_kl([], (x, y), reward="reward of the rollout batch"))], wide=True)]


def curve_sections(series: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[Section]:
    """A chart per metric, in sections by the first part of its name."""
    from trimtab.runs.charts import curves

    names = [name for name in _names(series) if not name.startswith("time/") and not name.endswith(("_low", "_high"))]
    prefixes = sorted({name.split("/")[0] for name in names}, key=lambda p: list(GROUPS).index(p) if p in GROUPS else len(GROUPS))
    sections = []
    for prefix in prefixes:
        charts = []
        for name in [name for name in names if name.split("/")[0] == prefix]:
            lines = {}
            for label, metrics in series:
                points = [(row["step"], row[name]) for row in metrics if row.get(name) is not None]
                if points:
                    lines[label] = ([p[0] for p in points], [p[1] for p in points])
            if lines:
                rows = [row for row in series[0][1] if row.get(f"{name}_low") is not None] if len(series) == 1 else []
                band = tuple([row[key] for row in rows] for key in ("step", f"{name}_low", f"{name}_high")) if rows else None
                final = f"  {_number(next(iter(lines.values()))[1][-1])}" if len(lines) == 1 else ""
                charts.append((f"{name.split('/', 1)[-1]}{final}", curves(lines, band)))
        sections.append(Section(GROUPS.get(prefix, prefix), charts=charts))
    return sections


def samples_section(rows: Sequence[dict[str, Any]], limit: int = 8) -> list[Section]:
    """First recorded step against the last: by prompt where prompts recur, else each alone."""
    if not rows:
        return []
    first, last = (min(row["step"] for row in rows), max(row["step"] for row in rows))
    before = {row["prompt"]: row for row in rows if row["step"] == first}
    after = [row for row in rows if row["step"] == last]
    shared = [row for row in after if row["prompt"] in before] if first != last else []
    if shared:
        samples = [_sample(row["prompt"], [("before", before[row["prompt"]]), ("after", row)]) for row in shared[:limit]]
        return [Section("Samples before and after", samples=samples)]
    made = [_sample(row["prompt"], [(f"step {first}", row)]) for row in list(before.values())[: limit // 2]] if first != last else []
    made += [_sample(row["prompt"], [(f"step {last}", row)]) for row in after[: limit // 2]]
    return [Section("Samples", f"From the first recorded step ({first}) and the last ({last}).", samples=made)]


def timing(metrics: Sequence[dict[str, Any]]) -> list[Section]:
    """Where a step's time goes, as the mean over steps."""
    from trimtab.runs.charts import stacked

    names = [name for name in _names([("", metrics)]) if name.startswith("time/") and name != "time/step"]
    means = {name.removeprefix("time/"): sum(_column(metrics, name)) / len(metrics) for name in names}
    return [Section("Time of a step", charts=[("", stacked(means))], wide=True)] if means else []


def _sample(prompt: str, answers: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "answers": [
            {"label": f"{label}: reward {_number(row.get('reward'))}, KL {_number(row.get('kl'))}", "text": row["response"]}
            for label, row in answers
        ],
    }


def _names(series: Sequence[tuple[str, Sequence[dict[str, Any]]]]) -> list[str]:
    return list(dict.fromkeys(name for _, metrics in series for row in metrics for name in row if name != "step"))


def _column(metrics: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [row[name] for row in metrics if row.get(name) is not None]


def _number(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _distinct(paths: Sequence[Path]) -> list[str]:
    """Run names: the folders' names where they differ, else their paths."""
    names = [path.name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _event(event: dict[str, Any]) -> str:
    details = ", ".join(f"{name}={value}" for name, value in event.items() if name not in ("time", "event"))
    return f"{event['event']}: {details}" if details else str(event["event"])
