"""Which metrics belong in one chart, what they are called, in what unit, and under which heading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from trimtab.algorithms import PREFERENCES


@dataclass(frozen=True)
class Panel:
    """One chart. lines: (metric, label), the last one decides the heading; band: metrics of the limits around the last line."""

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]
    band: tuple[str, str] | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*(metric for metric, _ in self.lines), *(self.band or ()))


def _one(metric: str, title: str, unit: str = "") -> Panel:
    return Panel(title, unit, ((metric, ""),))


def _two(title: str, unit: str, prefix: str, *names: str) -> Panel:
    return Panel(title, unit, tuple((f"{prefix}/{name}", name) for name in names))


LOSS_UNITS = dict.fromkeys(("dpo", "ld_dpo", "dpo_mean", "tr_dpo", "bco"), "nats; log 2 = 0.693 is a coin")

PANELS = (
    _one("reward/mean", "Reward", "mean over responses"),
    _one("reward/std", "Spread of the reward", "standard deviation"),
    _one("reward/shaped", "Reward after shaping", "mean over responses"),
    _two("Implicit reward", "β log π/π_ref", "reward", "chosen", "rejected"),
    _two("Implicit reward by label", "β log π/π_ref", "reward", "baseline", "undesirable", "desirable"),
    _one("kl/mean", "KL per response", "nats"),
    _one("kl/per_token", "KL per token", "nats"),
    _one("kl/beta", "Weight of the KL, β"),
    _one("response/length", "Response length", "tokens"),
    _one("response/truncated", "Cut off before the end", "share of responses"),
    _one("advantage/std", "Spread of the advantages", "standard deviation"),
    _one("sampler/mismatch", "Sampler against trainer", "mean |Δ log-probability|, nats"),
    _one("policy/loss", "Policy loss"),
    _one("policy/entropy", "Entropy", "nats per token"),
    _one("policy/clip_fraction", "Clipped", "share of tokens"),
    _one("policy/approx_kl", "KL of the update", "nats per token"),
    Panel("Probability ratio", "π / π_old, extremes", (("policy/ratio_max", "largest"), ("policy/ratio_min", "smallest"))),
    _one("policy/grad_norm", "Gradient norm, policy"),
    _one("policy/lr", "Learning rate, policy"),
    _one("critic/loss", "Value loss"),
    _one("critic/explained_variance", "Explained variance", "1 is perfect, 0 knows nothing"),
    _one("critic/grad_norm", "Gradient norm, critic"),
    _one("critic/lr", "Learning rate, critic"),
    _one("loss/pair", "Pair loss", "nats; log 2 = 0.693 is a coin"),
    *(_one(f"loss/{name}", f"{name.replace('_', ' ').upper()} loss", LOSS_UNITS.get(name, "")) for name in PREFERENCES),
    Panel("Negative log-likelihood", "nats per token", (("loss/nll", "training"), ("eval/nll", "held out"))),
    _one("loss/perplexity", "Perplexity"),
    Panel(
        "Accuracy", "share of pairs", (("train/accuracy", "training"), ("eval/accuracy", "held out")),
        ("eval/accuracy_low", "eval/accuracy_high"),
    ),
    Panel("Margin", "chosen minus rejected", (("train/margin", "training"), ("eval/margin", "held out"))),
    _two("Log-probability", "nats per response", "logprob", "chosen", "rejected"),
    _two("Log-probability by label", "nats per response", "logprob", "desirable", "undesirable"),
    _one("optim/grad_norm", "Gradient norm"),
    _one("optim/lr", "Learning rate"),
)  # fmt: skip

SECTIONS = {
    "Reward": ("reward",),
    "KL to the reference": ("kl",),
    "Loss": ("loss",),
    "On the training data": ("train",),
    "Held-out": ("eval",),
    "Log-probabilities": ("logprob",),
    "Responses": ("response", "advantage", "sampler"),
    "Policy": ("policy",),
    "Critic": ("critic",),
    "Optimiser": ("optim",),
}
"""Headings in the order of the page, and the prefixes under them. A prefix that is not here makes a heading of its own."""

NOT_DRAWN = ("time/", "progress/")
"""Told in other ways: the timing table, and the line under the title."""


def arrange(names: Iterable[str], *, together: bool = True) -> dict[str, list[Panel]]:
    """Sort metrics into charts under headings. Every name is drawn, known or not, except those of NOT_DRAWN.

    together: metrics that explain each other share a chart; otherwise each has its own (for comparing runs).
    """
    wanted = [name for name in dict.fromkeys(names) if not name.startswith(NOT_DRAWN)]
    sections: dict[str, list[Panel]] = {heading: [] for heading in SECTIONS}
    drawn: set[str] = set()
    for known in PANELS:
        for panel in _present(known, wanted, together):
            sections[_heading(panel.lines[-1][0])].append(panel)
            drawn.update(panel.metrics, () if together else known.band or ())
    for name in wanted:
        if name not in drawn:
            sections.setdefault(_heading(name), []).append(_one(name, _words(name)))
    return {heading: panels for heading, panels in sections.items() if panels}


def _present(panel: Panel, wanted: list[str], together: bool) -> list[Panel]:
    """The panel with the lines that are there: one chart, or one for each line."""
    lines = tuple(line for line in panel.lines if line[0] in wanted)
    if not lines:
        return []
    last_is_there = lines[-1] == panel.lines[-1]
    band = panel.band if panel.band and last_is_there and set(panel.band) <= set(wanted) else None
    if together:
        return [Panel(panel.title, panel.unit, lines, band)]
    return [Panel(f"{panel.title}, {label}" if label else panel.title, panel.unit, ((metric, ""),)) for metric, label in lines]


def _heading(metric: str) -> str:
    prefix = metric.partition("/")[0] if "/" in metric else "other"
    for heading, prefixes in SECTIONS.items():
        if prefix in prefixes:
            return heading
    return prefix[:1].upper() + prefix[1:]


def _words(metric: str) -> str:
    last = metric.partition("/")[2] or metric
    return last[:1].upper() + last[1:].replace("_", " ")
