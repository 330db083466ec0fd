"""The demo's report: what became better, by how much, what was paid for it, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.data.readers import read_rows
from trimtab.runs.charts import Point, reward_kl, reward_kl_png, stacked
from trimtab.runs.directory import RunDirectory
from trimtab.runs.report import Page, Section, curve_sections, number, step_time, write_page

NAMES = {"start": "start", "dpo": "DPO", "ppo": "PPO", "best_of_n": "best of n"}
NOTE = (
    "The annotator is simulated: its taste is the sentiment of the response (VADER, from -1 to 1), and its choices are noisy "
    "(Bradley-Terry). Gold is that taste without the noise; proxy is the reward model that was trained on the choices. PPO sees the proxy "
    "only, DPO the choices only; gold is used to judge, on prompts that no stage has seen."
)


def write_demo_report(folder: Path, summary: dict[str, Any], stages: Mapping[str, Path]) -> Path:
    """One page over the whole demo, and reward_kl.png beside it."""
    runs = {name: RunDirectory.open(path) for name, path in stages.items()}
    ppo, accuracy = summary["ppo"], summary["reward_model_accuracy"]
    page = Page("A language model, improved by human preferences", f"trimtab demo, seed {summary['seed']}")
    page.tiles = [
        (f"{ppo['gold_delta']:+.2f}", f"gold reward, PPO against the start [{ppo['gold_delta_low']:+.2f}, {ppo['gold_delta_high']:+.2f}]"),
        (f"{ppo['win_rate']:.0%}", "of held-out prompts won by PPO"),
        (f"{ppo['kl']:.1f} nats", "KL to the start, per response"),
        (
            f"{accuracy['accuracy']:.0%}",
            f"reward model, {accuracy['pairs']} held-out pairs [{accuracy['low']:.0%}, {accuracy['high']:.0%}]",
        ),
        (f"{sum(summary['stage_seconds'].values()) / 60:.1f} min", "all stages"),
    ]
    page.sections = [
        Section("Held-out prompts", NOTE, table=_table(summary), strong="PPO"),
        _pictures(summary, runs["ppo"]),
        Section("Before and after", samples=_samples(folder)),
        Section("Time by stage", charts=[("", stacked(summary["stage_seconds"]))], wide=True),
        Section("Time of a step", "Mean over the steps of each stage.", charts=_step_times(runs), wide=True),
    ]
    for name, run in runs.items():
        for section in curve_sections([(name, run.metrics())]):
            if section.title in ("Reward", "KL to the reference", "Loss", "Held-out", "Critic"):
                section.title = f"{NAMES.get(name, name)}: {section.title}"
                page.sections.append(section)
    page.details = [(f"Recipe of {name}", (run.path / "config.yaml").read_text(encoding="utf-8")) for name, run in runs.items()]
    reward_kl_png(_points(summary, "gold_reward"), None, folder / "reward_kl.png", reward="gold reward on held-out prompts")
    return write_page(page, folder / "report.html")


def _step_times(runs: Mapping[str, RunDirectory]) -> list[tuple[str, str]]:
    charts = []
    for name, run in runs.items():
        split, whole, _ = step_time(run.metrics())
        if split:
            charts.append((f"{NAMES.get(name, name)}: {number(whole, 3)} s", stacked(split)))
    return charts


def _table(summary: dict[str, Any]) -> dict[str, Any]:
    head = ["", "proxy", "gold", "change against start, 95 %", "win rate", "KL", "distinct-2", "perplexity"]
    rows = []
    for key, name in NAMES.items():
        row = summary[key]
        change = f"{row['gold_delta']:+.3f} [{row['gold_delta_low']:+.3f}, {row['gold_delta_high']:+.3f}]" if key != "start" else ""
        rows.append(
            [
                name, f"{row['proxy_reward']:.2f}", f"{row['gold_reward']:.3f}", change, f"{row['win_rate']:.2f}",
                ("≤ " if key == "best_of_n" else "") + f"{row['kl']:.2f}", f"{row['distinct2_ratio']:.2f}",
                f"{row['perplexity_under_reference']:.1f}",
            ]
        )  # fmt: skip
    return {"head": head, "rows": rows}


def _points(summary: dict[str, Any], reward: str) -> list[Point]:
    """The four models; the interval shown is that of the paired difference to the start."""
    points = []
    for key, name in NAMES.items():
        row = summary[key]
        low, high = (
            (row["gold_delta"] - row["gold_delta_low"], row["gold_delta_high"] - row["gold_delta"]) if reward == "gold_reward" else (0, 0)
        )
        points.append(Point(name, row["kl"], row[reward], row[reward] - low, row[reward] + high))
    return points


def _pictures(summary: dict[str, Any], ppo: RunDirectory) -> Section:
    metrics = ppo.metrics()
    path = ([row["kl/mean"] for row in metrics], [row["reward/mean"] for row in metrics])
    note = (
        "To the right is what was paid, upwards what was gained. Bars are 95 % intervals of the paired difference to the start. "
        "The line of dots, faint to strong, is PPO's way over its rollout batches. The KL of best of n is the bound log n - (n - 1) / n."
    )
    charts = [
        ("gold reward: what the annotator thinks", reward_kl(_points(summary, "gold_reward"), None, reward="gold reward")),
        ("proxy reward: what the reward model thinks", reward_kl(_points(summary, "proxy_reward"), path, reward="proxy reward")),
    ]
    return Section("Reward against KL", note, charts=charts, wide=True)


def _samples(folder: Path, count: int = 10) -> list[dict[str, Any]]:
    """The first held-out prompts, not picked: start beside PPO and DPO."""
    by_model: dict[str, list[Mapping[str, Any]]] = {}
    for row in read_rows(str(folder / "evaluation.jsonl")):
        by_model.setdefault(row.values["model"], []).append(row.values)
    samples = []
    for i, start in enumerate(by_model["start"][:count]):
        answers = [(name, by_model[key][i]) for key, name in NAMES.items() if key in ("start", "ppo", "dpo")]
        samples.append(
            {
                "prompt": start["prompt"],
                "answers": [{"label": f"{name}: gold {row['reward']:+.2f}", "text": row["response"]} for name, row in answers],
            }
        )
    return samples
