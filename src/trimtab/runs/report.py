"""Reports: one self-contained HTML page from a run's files, or from several runs side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from trimtab.algorithms import PREFERENCES
from trimtab.errors import RunError
from trimtab.runs.charts import Line, Point, curves, reward_kl, reward_kl_of_runs, stacked
from trimtab.runs.directory import RunDirectory
from trimtab.runs.panels import PANELS, Panel, arrange
from trimtab.runs.render import render
from trimtab.runs.trackers import flatten

HEADLINES = (
    "reward/mean", "kl/mean", "eval/accuracy", "eval/nll", "loss/nll", "loss/pair",
    *(f"loss/{name}" for name in PREFERENCES), "train/accuracy",
    "response/length", "model/reward", "against/reward", "model/kl", "comparison/win_rate",
)  # fmt: skip
"""The numbers that sum a run up, the most telling first."""

MOST_TILES = 5
TITLES = {metric: f"{panel.title}, {label}" if label else panel.title for panel in PANELS for metric, label in panel.lines}

Metrics = Sequence[Mapping[str, Any]]


@dataclass
class Section:
    """One part of a page: charts (title, markup), single values, a table, or samples under a heading.

    wide:    the charts are large.          text:   the table holds words, which are set left.
    values:  (name, number) of metrics that did not change, which need no chart.
    strong:  the first cell of the row of the table that matters most.
    """

    title: str
    note: str = ""
    charts: list[tuple[str, str]] = field(default_factory=list)
    values: list[tuple[str, str]] = field(default_factory=list)
    wide: bool = False
    table: dict[str, Any] | None = None
    text: bool = False
    strong: str = ""
    samples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Page:
    """What the template shows.

    facts:   (name, value) under the title.  alarm:   one sentence, if something went wrong.
    tiles:   (number, what it is).           legend:  names of the runs, in the order of their colours.
    details: (title, text) to unfold.
    """

    title: str
    subtitle: str
    tiles: list[tuple[str, str]] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)
    details: list[tuple[str, str]] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    alarm: str = ""
    legend: list[str] = field(default_factory=list)


def write_report(paths: Sequence[Path], output: Path) -> Path:
    """The report of one run, or a comparison of several. Raises RunError for a folder that is no run."""
    runs = [RunDirectory.open(path) for path in paths]
    if not runs:
        raise RunError("no run was named", fix="name at least one run directory")
    return write_page(one_run(runs[0]) if len(runs) == 1 else comparison(runs), output)


def write_page(page: Page, output: Path) -> Path:
    """Write a page to a file."""
    return render("report.html.j2", output, page=page)


def one_run(run: RunDirectory) -> Page:
    """Everything one run has to say."""
    metrics, events, config = run.metrics(), run.events(), run.config()
    page = Page(run.path.resolve().name, f"{_count(len(metrics), 'step')}{_duration(events)}", tiles(metrics))
    page.facts = _facts(config, events)
    page.alarm = _alarm(events)
    page.sections += picture(metrics)
    page.sections += curve_sections([(run.path.name, metrics)])
    page.sections += samples_section(run.sample_rows())
    page.sections += timing(metrics)
    page.details = [
        ("Recipe", yaml.safe_dump(config, sort_keys=False, allow_unicode=True)),
        ("Events", "\n".join(_event(event, events[0].get("time")) for event in events)),
    ]
    return page


def comparison(runs: Sequence[RunDirectory]) -> Page:
    """Several runs side by side: final values, differing settings, and curves in one chart each."""
    names = _distinct([run.path.resolve() for run in runs])
    series = list(zip(names, (run.metrics() for run in runs), strict=True))
    page = Page(f"{len(runs)} runs compared", "", legend=names)
    page.sections += _picture_of_runs(series)
    page.sections += curve_sections(series)
    flat = [{key: value for key, value in flatten(run.config()).items() if key != "output"} for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = [[key, *(_setting(settings[key]) if key in settings else "–" for settings in flat)] for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    note = "" if differing else "None: these runs have the same recipe."
    page.sections.append(
        Section("Settings that differ", note, table={"head": ["setting", *names], "rows": differing} if differing else None, text=True)
    )
    last = [metrics[-1] if metrics else {} for _, metrics in series]
    shown = [metric for panels in arrange(_names(series), together=False).values() for panel in panels for metric in panel.metrics]
    rows = [[name, *(number(row.get(name)) for row in last)] for name in shown]
    page.sections.append(Section("Final values", "At the last step of each run.", table={"head": ["metric", *names], "rows": rows}))
    page.sections += _timing_of_runs(series)
    return page


def tiles(metrics: Metrics) -> list[tuple[str, str]]:
    """The few numbers that sum a run up: the last of each, and the first where it was another."""
    made = []
    for name in HEADLINES:
        column = _column(metrics, name)
        if column:
            first, last = number(column[0], 3), number(column[-1], 3)
            made.append((f"{first} → {last}" if first != last else last, TITLES.get(name, name)))
    return made[:MOST_TILES]


def picture(metrics: Metrics) -> list[Section]:
    """Reward against KL, where a run has both: the way it took, or (an evaluation) the models it measured."""
    way = _way(metrics)
    if len(way[0]) > 1:
        note = "What was gained, and what was paid for it. Each dot is one rollout batch: the first are faint, the last strong."
        return [Section("Reward against KL", note, charts=[("", reward_kl([], way, reward="reward of the rollout batch"))], wide=True)]
    points = []
    for row in metrics[-1:]:
        for name in ("against", "model"):
            if f"{name}/reward_low" in row:
                x, *y = (row[f"{name}/{key}"] for key in ("kl", "reward", "reward_low", "reward_high"))
                points.append(Point(name, x, *y))
    note = "What was gained, and what was paid for it, with 95 % intervals."
    return [Section("Reward against KL", note, charts=[("", reward_kl(points))], wide=True)] if points else []


def curve_sections(series: Sequence[tuple[str, Metrics]]) -> list[Section]:
    """The metrics of runs as charts, in sections. What never changed is told as a number instead.

    Several runs get one chart per metric, with a line for each run; one run's related metrics share a chart.
    """
    sections = []
    for heading, panels in arrange(_names(series), together=len(series) == 1).items():
        section = Section(heading)
        for panel in panels:
            lines = _lines(panel, series)
            if lines and all(math.isclose(y, lines[0].y[0], rel_tol=1e-6) for line in lines for y in line.y):
                section.values += [(metric, number(lines[0].y[-1])) for metric, _ in panel.lines]
            elif lines:
                finals = " / ".join(number(line.y[-1], 3) for line in lines) if len(series) == 1 else ""
                section.charts.append(("", curves(lines, title=panel.title, value=finals, unit=panel.unit or panel.lines[0][0])))
        if section.charts or section.values:
            sections.append(section)
    return sections


def samples_section(rows: Sequence[Mapping[str, Any]], limit: int = 8) -> list[Section]:
    """First recorded step against the last: by prompt where prompts recur, else each alone. Nothing is picked by its reward."""
    if not rows:
        return []
    steps: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        steps.setdefault(row["prompt"], {}).setdefault(row["step"], row)
    recurring = [(prompt, min(seen), max(seen), seen) for prompt, seen in steps.items() if len(seen) > 1]
    if recurring:
        note = "The first recorded response to a prompt and the last, in the order of recording."
        samples = [
            _sample(prompt, [(f"before, step {a}", seen[a]), (f"after, step {b}", seen[b])]) for prompt, a, b, seen in recurring[:limit]
        ]
        return [Section("Samples before and after", note, samples=samples)]
    first, last = (min(row["step"] for row in rows), max(row["step"] for row in rows))
    note = f"Different prompts from the first recorded step and the last, in the order of recording: step {first} beside step {last}."
    before, after = ([row for row in rows if row["step"] == step][: limit // 2] for step in (first, last))
    ordered = before if first == last else [*before, *after]
    return [
        Section(
            "Samples", note if first != last else "", samples=[_sample(row["prompt"], [(f"step {row['step']}", row)]) for row in ordered]
        )
    ]


def timing(metrics: Metrics) -> list[Section]:
    """Where a step's time goes, as the mean over steps."""
    split, whole, beside = step_time(metrics)
    note = f"Mean over {_count(len(metrics), 'step')}: {number(whole, 3)} s."
    if beside:
        note += f" At the same time, for the next step: {', '.join(f'{part} {number(s, 3)} s' for part, s in beside.items())}."
    return [Section("Time of a step", note, charts=[("", stacked(split))], wide=True)] if split else []


def step_time(metrics: Metrics) -> tuple[dict[str, float], float, dict[str, float]]:
    """Mean seconds of a step: by part, as a whole, and what went on beside it (which is in neither)."""
    means = _mean_times(metrics)
    beside = {part.removeprefix("beside/"): means.pop(part) for part in list(means) if part.startswith("beside/")}
    whole = means.pop("step", 0.0) or sum(means.values())
    rest = whole - sum(means.values())
    if means and rest > 0.01 * whole:
        means["other"] = rest
    return means, whole, beside


def number(value: float | str | None, digits: int = 4) -> str:
    """A number for people: so many significant digits, 2.1e−5 where it is very small, and no more zeros than it needs."""
    if value is None:
        return "–"
    if not isinstance(value, float | int):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}".replace("-", "−")
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{decimals}f}"
        return (text.rstrip("0").rstrip(".") if decimals else text).replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits - 2}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")


def _setting(value: Any) -> str:
    """A value as a recipe would have it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _picture_of_runs(series: Sequence[tuple[str, Metrics]]) -> list[Section]:
    ways = {name: _way(metrics) for name, metrics in series}
    if not any(len(x) > 1 for x, _ in ways.values()):
        return []
    note = "Further up for the same distance to the right is better: more reward at the same KL."
    chart = reward_kl_of_runs(ways, reward="reward of the rollout batch")
    return [Section("Reward against KL", note, charts=[("", chart)], wide=True)]


def _timing_of_runs(series: Sequence[tuple[str, Metrics]]) -> list[Section]:
    means = [_mean_times(metrics) for _, metrics in series]
    parts = dict.fromkeys(part for row in means for part in row)
    rows = [[part, *(number(row.get(part), 3) for row in means)] for part in parts]
    return (
        [Section("Time of a step", "Seconds, mean over steps.", table={"head": ["", *(name for name, _ in series)], "rows": rows})]
        if rows
        else []
    )


def _lines(panel: Panel, series: Sequence[tuple[str, Metrics]]) -> list[Line]:
    """The curves of a panel: its own lines for one run, a line for each run otherwise. A colour for each."""
    alone, lines = len(series) == 1, []
    for run, (_, metrics) in enumerate(series):
        for i, (metric, label) in enumerate(panel.lines):
            limits = panel.band if panel.band and i == len(panel.lines) - 1 else ()
            rows = [row for row in metrics if all(row.get(name) is not None for name in (metric, *limits))]
            band = ([row[limits[0]] for row in rows], [row[limits[1]] for row in rows]) if limits else None
            if rows:
                shown = label if len(panel.lines) > 1 else ""
                lines.append(Line([row["step"] for row in rows], [row[metric] for row in rows], shown, i if alone else run, band))
    return lines


def _way(metrics: Metrics) -> tuple[list[float], list[float]]:
    rows = [row for row in metrics if row.get("kl/mean") is not None and row.get("reward/mean") is not None]
    return [row["kl/mean"] for row in rows], [row["reward/mean"] for row in rows]


def _mean_times(metrics: Metrics) -> dict[str, float]:
    """Mean seconds by part, over all steps: a part that not every step has weighs accordingly."""
    names = [name for name in _names([("", metrics)]) if name.startswith("time/")]
    return {name.removeprefix("time/"): sum(_column(metrics, name)) / len(metrics) for name in names}


def _sample(prompt: str, answers: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    return {"prompt": prompt, "answers": [{"label": f"{label}: {_judged(row)}", "text": row["response"]} for label, row in answers]}


def _judged(row: Mapping[str, Any]) -> str:
    parts = row.get("parts") or {}
    told = f" ({', '.join(f'{name} {number(part, 3)}' for name, part in parts.items())})" if len(parts) > 1 else ""
    cut = ", cut off" if row.get("truncated") else ""
    return f"reward {number(row.get('reward'), 3)}{told}, KL {number(row.get('kl'), 3)}{cut}"


def _names(series: Sequence[tuple[str, Metrics]]) -> list[str]:
    return list(dict.fromkeys(name for _, metrics in series for row in metrics for name in row if name != "step"))


def _column(metrics: Metrics, name: str) -> list[float]:
    return [row[name] for row in metrics if row.get(name) is not None]


def _distinct(paths: Sequence[Path]) -> list[str]:
    """Names for runs: as much of the end of their paths as tells them apart."""
    for parts in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({i})" for i, path in enumerate(paths, 1)]  # a run compared with itself


def _facts(config: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What the run is."""
    started: Mapping[str, Any] = next((event for event in events if event["event"] == "started"), {})
    model, data = (part.get("path") if isinstance(part, Mapping) else part for part in (config.get("model"), config.get("data")))
    begun = datetime.fromtimestamp(events[0]["time"], UTC).strftime("%Y-%m-%d %H:%M UTC") if events else None
    facts = [("stage", started.get("stage")), ("model", model), ("data", data), ("seed", config.get("seed")), ("started", begun)]
    return [(name, str(value)) for name, value in facts if value is not None]


def _alarm(events: Sequence[Mapping[str, Any]]) -> str:
    """What there is to say of a run that did not end well."""
    end = next((event for event in reversed(events) if event["event"] in ("finished", "interrupted", "failed")), None)
    if end is None:
        return "This run has not finished: it is still going on, or it was killed."
    return {"finished": "", "interrupted": "This run was interrupted.", "failed": f"This run failed. {end.get('error', '')}"}[end["event"]]


def _duration(events: Sequence[Mapping[str, Any]]) -> str:
    seconds = round(events[-1]["time"] - events[0]["time"]) if events else 0
    return f" in {_clock(seconds)}" if seconds else ""


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d} min"


def _count(n: int, thing: str) -> str:
    return f"{n:,} {thing}" if n == 1 else f"{n:,} {thing}s"


def _event(event: Mapping[str, Any], start: float | None) -> str:
    """An event as one line: when, what, and its details."""
    since = round(event["time"] - start) if start is not None else 0
    details = "  ".join(f"{name}={value}" for name, value in event.items() if name not in ("time", "event"))
    return f"{since // 3600}:{since // 60 % 60:02d}:{since % 60:02d}  {event['event']:<12}{details}".rstrip()
