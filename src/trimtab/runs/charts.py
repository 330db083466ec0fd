"""Charts as SVG text that takes its colours for text and lines from the page, so that it fits light and dark alike."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK = "#010203"  # stands for the page's text colour; replaced after drawing
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999933", "#882255")  # Okabe and Ito, colour-blind safe


@dataclass(frozen=True)
class Point:
    """One evaluated model in the reward-KL plane, with its interval in reward."""

    label: str
    kl: float
    reward: float
    low: float
    high: float


def curves(series: Mapping[str, tuple[Sequence[float], Sequence[float]]], band: tuple[Sequence[float], ...] | None = None) -> str:
    """One small chart: a line per series over steps; `band` is (steps, low, high)."""
    figure, axes = _figure(3.6, 2.1)
    for colour, (label, (x, y)) in zip(PALETTE * 4, series.items(), strict=False):
        axes.plot(x, y, color=colour, linewidth=1.6, label=label, marker="o" if len(x) < 3 else None, markersize=3)
    if band is not None:
        axes.fill_between(band[0], band[1], band[2], color=PALETTE[0], alpha=0.15, linewidth=0)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=7, labelcolor=INK)
    axes.set_xlabel("step", fontsize=7, color=INK, loc="right", labelpad=1)
    return _svg(figure)


def reward_kl(points: Sequence[Point], path: tuple[Sequence[float], Sequence[float]] | None = None, *, reward: str = "reward") -> str:
    """Reward against KL: the way a run took (one dot per step, later is darker) and evaluated models with their intervals."""
    return _svg(_draw_reward_kl(points, path, reward, INK))


def reward_kl_png(points: Sequence[Point], path: tuple[Sequence[float], Sequence[float]] | None, file: Path, *, reward: str) -> None:
    """The same as a picture for places that show no SVG."""
    figure = _draw_reward_kl(points, path, reward, "#222222")
    figure.savefig(file, dpi=160, facecolor="white", metadata={"Software": None})


def stacked(parts: Mapping[str, float]) -> str:
    """Seconds by part, as one horizontal bar."""
    figure, axes = _figure(7.4, 0.9)
    left, total = 0.0, sum(parts.values()) or 1.0
    for colour, (label, seconds) in zip(PALETTE * 4, parts.items(), strict=False):
        axes.barh([0], [seconds], left=left, color=colour, height=0.6)
        if seconds / total > 0.06:
            axes.text(left + seconds / 2, 0, f"{label}\n{seconds:.3g} s", ha="center", va="center", fontsize=7, color="white")
        left += seconds
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(False)
    axes.set_xlim(0, total)
    return _svg(figure)


def _draw_reward_kl(points: Sequence[Point], path: Any, reward: str, ink: str) -> Any:
    figure, axes = _figure(7.4, 3.4, ink)
    if path is not None and len(path[0]):
        x, y = path
        axes.plot(x, y, color=PALETTE[0], linewidth=0.8, alpha=0.35)
        axes.scatter(x, y, c=range(len(x)), cmap="Blues", vmin=-len(x) / 2, s=14, linewidths=0, zorder=2)
    for colour, point in zip(PALETTE[1:] * 4, points, strict=False):
        errors = [[point.reward - point.low], [point.high - point.reward]]
        axes.errorbar([point.kl], [point.reward], yerr=errors, fmt="o", color=colour, markersize=6, capsize=3, linewidth=1.4, zorder=3)
        axes.annotate(point.label, (point.kl, point.reward), xytext=(8, 5), textcoords="offset points", fontsize=9, color=ink)
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("KL to the start, nats per response", fontsize=8, color=ink)
    axes.set_ylabel(reward, fontsize=8, color=ink)
    return figure


def _figure(width: float, height: float, ink: str = INK) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "trimtab", "font.family": "sans-serif"})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ink)
        axes.spines[side].set_alpha(0.35)
    axes.tick_params(colors=ink, labelsize=7, length=2)
    axes.grid(color=ink, alpha=0.09, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font: \1 system-ui, sans-serif", text)
    text = re.sub(r'xmlns:xlink="[^"]*"', "", text)
    return text.replace("xlink:href", "href").replace(INK, "currentColor")
