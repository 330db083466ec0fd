"""Charts. In a page they are inline SVG whose colours are CSS variables, so that they follow its light or dark mode.

Nothing here uses pyplot or any other global state, and the same numbers always give the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 8
"""Series have this many colours, which colour-blind people can tell apart (Okabe and Ito's, two of Tol's); then they repeat, dashed."""

MANY_POINTS = 80
"""A line of more points than this is drawn faintly, with its running mean on top."""

TEXT = 8.5
INCH = 72


@dataclass(frozen=True)
class Palette:
    """The colours of a chart: `series` by number, `ramp` by a fraction from 0 (early) to 1 (late)."""

    muted: str
    grid: str
    series: Callable[[int], str]
    ramp: Callable[[float], str]


# matplotlib takes no CSS variables: the chart is drawn in colours nobody would choose, which the SVG then replaces.
PAGE = Palette("#010101", "#010102", lambda i: f"#0102{i % COLOURS:02x}", lambda share: f"#0103{round(100 * share):02x}")
VARIABLES = {
    PAGE.muted: "var(--muted)",
    PAGE.grid: "var(--rule)",
    **{PAGE.series(i): f"var(--series-{i})" for i in range(COLOURS)},
    **{PAGE.ramp(i / 100): f"color-mix(in oklab, var(--late) {i}%, var(--early))" for i in range(101)},
}

_PRINTED = ("#0072b2", "#d55e00", "#00875f", "#b5548b", "#b07a00", "#3a8fc4", "#7a7a1f", "#882255")


def _blend(share: float) -> str:
    early, late = (0x9F, 0xB3, 0xC8), (0x0B, 0x4F, 0x8A)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(early, late, strict=True))


PRINT = Palette("#5c6570", "#e3e6ea", lambda i: _PRINTED[i % COLOURS], _blend)
"""Real colours on white, for pictures outside a page."""


@dataclass(frozen=True)
class Line:
    """A curve: y over x, with a label at its end (or none), the number of its colour, and perhaps limits around it."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    series: int = 0
    band: tuple[Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Point:
    """One evaluated model in the reward-KL plane, with its interval in reward (of no length where none is known)."""

    label: str
    kl: float
    reward: float
    low: float
    high: float


Way = tuple[Sequence[float], Sequence[float]]
"""A run's way through the reward-KL plane: the KL and the reward of every step, in order."""


def curves(lines: Sequence[Line], *, title: str, value: str = "", unit: str = "") -> str:
    """A small chart of one or several curves over steps, under its caption: what it is, the last value, the unit."""
    figure, axes = _canvas(264, 138, right=8 + _label_room(lines), top=8, bottom=20, palette=PAGE)
    for line in lines:
        _draw_line(axes, line)
    _frame(axes, [x for line in lines for x in line.x], [y for line in lines for y in _extent(line)])
    _label_ends(axes, lines)
    caption = f"<b>{escape(title)}</b><output>{escape(value)}</output><small>{escape(unit)}</small>"
    return f"<figcaption>{caption}</figcaption>{_svg(figure, title)}"


def reward_kl(points: Sequence[Point], path: Way | None = None, *, reward: str = "reward") -> str:
    """Reward against KL, as SVG: the way a run took, early steps faint and late ones strong, and evaluated models with their intervals."""
    figure, axes = _canvas(340, 228, right=12, top=26, bottom=36, palette=PAGE)
    _draw_reward_kl(axes, points, {"": path} if path is not None else {}, reward, PAGE)
    return _svg(figure, f"{reward} against KL")


def reward_kl_of_runs(paths: Mapping[str, Way], *, reward: str = "reward") -> str:
    """The ways several runs took, by name, a colour each. A run that took none keeps its colour for the other charts."""
    figure, axes = _canvas(340, 228, right=12, top=26, bottom=36, palette=PAGE)
    _draw_reward_kl(axes, (), paths, reward, PAGE)
    return _svg(figure, f"{reward} against KL, {len(paths)} runs")


def reward_kl_png(points: Sequence[Point], path: Way | None, file: Path, *, reward: str) -> None:
    """The picture of `reward_kl` as PNG on white, for places that show no SVG."""
    figure, axes = _canvas(400, 240, right=12, top=26, bottom=36, palette=PRINT)
    figure.patch.set(visible=True, facecolor="white")
    _draw_reward_kl(axes, points, {"": path} if path is not None else {}, reward, PRINT)
    figure.savefig(file, dpi=2.5 * INCH, bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})


def frontier_png(points: Sequence[Point], frontier: Way, file: Path, *, reward: str) -> None:
    """Policies in the reward-KL plane under the curve that none can pass, as PNG on white."""
    figure, axes = _canvas(520, 320, right=12, top=26, bottom=36, palette=PRINT)
    figure.patch.set(visible=True, facecolor="white")
    inside = [i for i, kl in enumerate(frontier[0]) if kl <= 1.1 * max(point.kl for point in points)]
    curve = [frontier[0][i] for i in inside], [frontier[1][i] for i in inside]
    axes.plot(*curve, color=PRINT.muted, linewidth=1.2, zorder=1)
    _draw_reward_kl(axes, points, {}, reward, PRINT)
    figure.savefig(file, dpi=2 * INCH, bbox_inches="tight", pad_inches=0.12, metadata={"Software": None})


def stacked(parts: Mapping[str, float]) -> str:
    """Seconds by part as one bar with its key, as HTML: text in it wraps on a phone, which that of an SVG does not."""
    total = sum(parts.values()) or 1.0
    bar, key = [], []
    for i, (label, seconds) in enumerate(parts.items()):
        colour, share = f"var(--series-{i % COLOURS})", seconds / total
        bar.append(f'<i style="flex-grow:{share:.4f};background:{colour}"></i>')
        amount = f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"
        key.append(f'<li><i style="background:{colour}"></i>{escape(label)} <b>{amount} s</b> {share:.0%}</li>')
    return f'<div class="bar">{"".join(bar)}</div><ul class="key">{"".join(key)}</ul>'


def _canvas(width: float, height: float, *, right: float, top: float, bottom: float, palette: Palette) -> tuple[Figure, Axes]:
    """A figure and its margins, in points; `_frame` makes the left margin as wide as the tick labels need."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / INCH, height / INCH), dpi=INCH)
    figure.patch.set_visible(False)
    axes = figure.add_axes((0, bottom / height, 1 - right / width, 1 - (top + bottom) / height))
    _style(axes, palette)
    return figure, axes


def _style(axes: Axes, palette: Palette) -> None:
    axes.patch.set_visible(False)
    for side in ("left", "right", "top"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=palette.muted, linewidth=0.6)
    axes.tick_params(axis="both", labelsize=TEXT, labelcolor=palette.muted, color=palette.muted, width=0.6, length=3, pad=3)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color=palette.grid, linewidth=0.6)
    axes.set_axisbelow(True)


def _frame(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> None:
    """Limits a little wider than the data, and a few ticks with as many decimals as they need."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

    for values, limit, axis, room in ((xs, axes.set_xlim, axes.xaxis, 0.02), (ys, axes.set_ylim, axes.yaxis, 0.08)):
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        low, high = min(finite), max(finite)
        spread = high - low
        if spread <= 1e-6 * max(abs(low), abs(high)):  # as good as constant: rounding errors make no mountains
            low, high, spread = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1), abs(low) or 1
        limit(low - room * spread, high + room * spread)
        axis.set_major_locator(MaxNLocator(nbins=5, min_n_ticks=3, steps=[1, 2, 2.5, 5, 10]))
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.yaxis.get_major_locator().tick_values(low, high) if low <= tick <= high]
    step = ticks[1] - ticks[0] if len(ticks) > 1 else high - low
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda tick, _: _tick(tick, step)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tick, _: f"{tick:g}".replace("-", "−")))
    _make_room(axes, max((len(_tick(tick, step)) for tick in ticks), default=0))


def _make_room(axes: Axes, letters: int) -> None:
    """Move the left end of the axes so that the tick labels, of so many letters at most, begin where the page's text does."""
    place, width = axes.get_position(), _figure_of(axes).get_figwidth() * INCH
    left = (4 + 0.58 * TEXT * letters) / width
    axes.set_position((left, place.y0, place.x1 - left, place.height))


def _tick(value: float, step: float) -> str:
    if abs(step) < 1e-4 or abs(value) >= 1e6:
        return f"{value + 0.0:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    decimals = max(0, -math.floor(math.log10(abs(step) * 1.0000001)))
    if abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6:  # steps of 2.5
        decimals += 1
    return f"{value + 0.0:.{decimals}f}".replace("-", "−")


def _draw_line(axes: Axes, line: Line) -> None:
    colour = PAGE.series(line.series)
    style: Any = "-" if line.series < COLOURS else (0, (4, 2))
    if line.band is not None:
        axes.fill_between(line.x, *line.band, color=colour, alpha=0.15, linewidth=0)
    if len(line.x) > MANY_POINTS:
        axes.plot(line.x, line.y, color=colour, linewidth=0.6, alpha=0.35)
        axes.plot(line.x, _running_mean(line.y), color=colour, linewidth=1.6, linestyle=style)
    else:
        few = len(line.x) <= 25
        axes.plot(
            line.x, line.y, color=colour, linewidth=1.5, linestyle=style, marker="o" if few else None, markersize=2.6, markeredgewidth=0
        )


def _running_mean(y: Sequence[float]) -> list[float]:
    reach = max(1, len(y) // 50)
    return [sum(piece) / len(piece) for i in range(len(y)) if (piece := y[max(0, i - reach) : i + reach + 1])]


def _extent(line: Line) -> list[float]:
    low, high = line.band or ((), ())
    return [*line.y, *low, *high]


def _label_room(lines: Sequence[Line]) -> float:
    return max((len(line.label) for line in lines), default=0) * 4.6 + (4 if any(line.label for line in lines) else 0)


def _label_ends(axes: Axes, lines: Sequence[Line]) -> None:
    """A label at the end of each line, in its colour, pushed up where it would touch the one below."""
    ends = [
        (axes.transData.transform((0, _running_mean(line.y)[-1] if len(line.y) > MANY_POINTS else line.y[-1]))[1], line) for line in lines
    ]
    below = -math.inf
    for height, line in sorted(ends, key=lambda end: end[0]):
        below = max(height, below + 1.2 * TEXT)
        at = (1.0, axes.transAxes.inverted().transform((0, below))[1])
        axes.annotate(
            line.label, at, (4, 0), xycoords="axes fraction", textcoords="offset points", va="center", fontsize=TEXT,
            color=PAGE.series(line.series), parse_math=False,
        )  # fmt: skip


def _draw_reward_kl(axes: Axes, points: Sequence[Point], paths: Mapping[str, Way], reward: str, palette: Palette) -> None:
    dots = [(p.kl, p.reward) for p in points] + [dot for way in paths.values() for dot in zip(*way, strict=True)]
    heights = [p.low for p in points] + [p.high for p in points] + [y for _, y in dots]
    _frame(axes, [0.0, *(x for x, _ in dots)], heights)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high + 0.08 * (high - low))  # room for the label of the rightmost point
    axes.set_xlabel("KL to the reference, nats per response", fontsize=TEXT, color=palette.muted, labelpad=4)
    top = axes.get_position().y1 + 10 / INCH / _figure_of(axes).get_figheight()
    _figure_of(axes).text(0, top, reward, fontsize=TEXT, color=palette.muted, parse_math=False)
    labels: list[Label] = []
    for i, (name, (x, y)) in enumerate(paths.items()):
        if not x:
            continue
        colours = [palette.series(i) if name else palette.ramp(step / max(len(x) - 1, 1)) for step in range(len(x))]
        axes.plot(x, y, color=palette.series(i) if name else palette.muted, linewidth=0.7, alpha=0.5, zorder=2)
        axes.scatter(x, y, c=colours, s=18 if len(x) <= MANY_POINTS else 8, linewidths=0, zorder=3)
        dots += [
            (a[0] + (b[0] - a[0]) * part / 4, a[1] + (b[1] - a[1]) * part / 4)
            for a, b in pairwise(zip(x, y, strict=True))
            for part in (1, 2, 3)
        ]
        if name:
            labels.append(Label(name, x[-1], y[-1], colours[-1]))
        elif len(x) > 1:
            labels += [Label("first step", x[0], y[0], palette.muted), Label("last step", x[-1], y[-1], palette.muted)]
    marks = []
    for i, point in enumerate(points, 1):
        colour = palette.series(i)
        axes.vlines(point.kl, point.low, point.high, color=colour, linewidth=1.5, zorder=5)
        axes.plot([point.kl], [point.reward], "o", color=colour, markersize=6, markeredgewidth=0, zorder=6)
        marks.append(Label(point.label, point.kl, point.reward, colour))
        dots += [(point.kl, point.low + (point.high - point.low) * part / 10) for part in range(11)]
    _place_labels(axes, [*marks, *labels], dots)


@dataclass(frozen=True)
class Label:
    """A word that belongs beside a point."""

    text: str
    x: float
    y: float
    colour: str


def _place_labels(axes: Axes, labels: Sequence[Label], dots: Sequence[tuple[float, float]]) -> None:
    """Write each label on the side of its point where it covers least: other labels, dots and bars, the edge."""
    height, letter = 1.25 * TEXT, 0.55 * TEXT  # in points, which are the figure's pixels
    busy = [tuple(axes.transData.transform(dot)) for dot in dots]
    inside = axes.bbox
    taken: list[tuple[float, float, float, float]] = []
    for label in labels:
        x, y = axes.transData.transform((label.x, label.y))
        width = letter * len(label.text)

        def cost(place: tuple[int, float, float], x: float = x, y: float = y, width: float = width) -> tuple[float, int]:
            box = _box(x, y, width, height, place)
            covered = sum(box[0] - 2 < a < box[2] + 2 and box[1] < b < box[3] for a, b in busy)
            touched = sum(box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3] for other in taken)
            outside = box[0] < inside.x0 or box[2] > inside.x1 + 8 or box[1] < inside.y0 or box[3] > inside.y1 + 4
            return 5 * touched + covered + 8 * outside + place[0] / 20, place[0]

        best = min(PLACES, key=cost)
        left, bottom, right, top = _box(x, y, width, height, best)
        taken.append((left, bottom, right, top))
        # Held at the end towards its point, because only the font that shows it knows how wide it is.
        at, side = {1: (left, "left"), -1: (right, "right")}.get(int(best[1]), ((left + right) / 2, "center"))
        x, y = axes.transData.inverted().transform((at, (bottom + top) / 2))
        axes.text(x, y, label.text, ha=side, va="center", fontsize=TEXT, color=label.colour, zorder=7, parse_math=False)


PLACES = [
    (away, dx, dy)
    for away in (7, 11, 16, 24)
    for dx, dy in ((1.0, 0.0), (0.0, 1.0), (-1.0, 0.0), (0.0, -1.0), (1.0, 0.8), (-1.0, 0.8), (1.0, -0.8), (-1.0, -0.8))
]
"""Where a label may stand: points away from its mark, and the direction."""


def _box(x: float, y: float, width: float, height: float, place: tuple[int, float, float]) -> tuple[float, float, float, float]:
    away, dx, dy = place
    left = x + dx * away - width * (1 - dx) / 2
    bottom = y + dy * away - height / 2
    return left, bottom, left + width, bottom + height


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element to put into a page: no namespaces, no metadata, text as text in the page's own font."""
    from matplotlib import rc_context

    file = io.StringIO()
    with warnings.catch_warnings(), rc_context({"svg.fonttype": "none", "svg.hashsalt": "trimtab", "svg.id": None}):
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts draw the text, and know more scripts
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    body = text[text.index(">", box.end()) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<style type="text/css">.*?</style>', "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href").replace("stroke-linejoin: miter", "stroke-linejoin: round")
    body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)  # the size stays, the family is the page's
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    used = set(re.findall(r"""(?:href="#|url\(#)([^")]+)""", body))
    body = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", body)
    body = re.sub(r"#0[0-9a-f]{5}\b", lambda found: VARIABLES.get(found[0], found[0]), body)
    body = re.sub(r"\s*\n\s*", "\n", body).strip()
    return f'<svg class="chart" role="img" aria-label="{escape(title)}" {box[0]}>\n{body}\n</svg>'
