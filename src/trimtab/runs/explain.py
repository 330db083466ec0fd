"""`trimtab explain RUN STEP`: one training step token by token, in the terminal and as a page. Reads files only."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import RunError
from trimtab.runs.render import render

HEADINGS = {
    "token": "the token",
    "logp": "log pi(y_t | s_t) of the policy that sampled",
    "ref": "the same of the reference",
    "ratio": "pi / pi_old after this step's updates",
    "KL": "log pi_old - log pi_ref of the token",
    "reward": "score placed on the token, and penalty: r_t",
    "value": "V(s_t) before the token",
    "TD error": "r_t + gamma V(s_t+1) - V(s_t)",
    "advantage": "A_t",
    "of reward": "the part of A_t that comes from the score",
    "of KL": "from the KL penalty",
    "of value": "from the critic",
    "of baseline": "from what was subtracted (mean of the batch, greedy response)",
    "weight": "the factor of grad log pi(y_t) in the loss's gradient now; 0 where clipped",
}


WIDTH = 160
"""Characters a line of the table may need; a narrower terminal wraps lines rather than numbers."""


@dataclass(frozen=True)
class Token:
    """One line of the table: the numbers under HEADINGS, and whether the clip holds it."""

    text: str
    numbers: tuple[float | None, ...]
    clipped: bool


@dataclass(frozen=True)
class Told:
    """One response: its tokens, and its advantage (mean over tokens) with the parts it is the sum of."""

    prompt: str
    response: str
    score: float
    reward: float
    kl: float
    truncated: bool
    tokens: tuple[Token, ...]
    advantage: float
    parts: dict[str, float]


def load(run: Path, step: int) -> list[Told]:
    """The recorded responses of a step. Raises RunError naming the steps there are."""
    folder = run / "steps"
    path = folder / f"step-{step:06d}.jsonl"
    if not path.is_file():
        there = sorted(int(p.stem.removeprefix("step-")) for p in folder.glob("step-*.jsonl")) if folder.is_dir() else []
        if not there:
            fix = "name a run of a policy algorithm; its explain_prompts must be above 0"
            raise RunError("no step of this run was recorded", where=str(run), fix=fix)
        known = ", ".join(map(str, there))
        raise RunError(f"step {step} was not recorded", where=str(run), fix=f"recorded are {known}; see samples_every")
    return [_told(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def explain(run: Path, step: int, *, response: int | None = None) -> Path:
    """Print one response (the first, or number `response`), write all of them as a page, and return the page's path."""
    told = load(run, step)
    if response is not None and not 0 <= response < len(told):
        raise RunError(f"there is no response {response}", where=f"{run}, step {step}", fix=f"0 to {len(told) - 1} are recorded")
    _print(told[response or 0], f"{run}, step {step}, response {response or 0} of {len(told)}")
    content = {"run": run.name, "step": step, "told": told, "headings": HEADINGS}
    return render("explain.html.j2", run / "steps" / f"step-{step:06d}.html", {"number": number, "pull": _pull}, **content)


def number(value: float | None) -> str:
    """Three digits after the point, a true minus sign, nothing for nothing."""
    if value is None:
        return ""
    text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"
    return text.replace("-", "−") if float(text) else "0"


def _pull(told: Told) -> list[tuple[Token, float]]:
    """Every token with its gradient weight as a share of the largest, from -1 to 1."""
    largest = max((abs(t.numbers[-1] or 0.0) for t in told.tokens), default=0.0) or 1.0
    return [(t, (t.numbers[-1] or 0.0) / largest) for t in told.tokens]


def _told(row: dict[str, Any]) -> Told:
    reference = row.get("reference")
    tokens, kls = [], []
    for t, text in enumerate(row["tokens"]):
        kl = None if reference is None else row["logprob"][t] - reference[t]
        kls.append(kl or 0.0)
        numbers = (
            row["logprob"][t], None if reference is None else reference[t], math.exp(row["now"][t] - row["logprob"][t]), kl,
            row["reward_score"][t] + row["reward_kl"][t], row["value"][t], row["td_error"][t], row["advantage"][t],
            *(row[f"advantage_{part}"][t] for part in ("reward", "kl", "value", "baseline")), row["gradient_weight"][t],
        )  # fmt: skip
        tokens.append(Token(text, numbers, bool(row["clipped"][t])))

    def mean(name: str) -> float:
        return float(sum(row[name]) / len(row[name]))

    parts = {part: mean(f"advantage_{part}") for part in ("reward", "kl", "value", "baseline")}
    return Told(
        row["prompt"], row["response"], row["score"], row["reward"], sum(kls), row["truncated"], tuple(tokens), mean("advantage"), parts
    )


def _print(told: Told, title: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.print(
        Text(f"{title}\n"), Text("prompt    ", "dim"), Text(told.prompt), Text("\nresponse  ", "dim"), Text(told.response), sep=""
    )
    table = Table(box=None, pad_edge=False)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    for token in told.tokens:
        numbers = [number(x) for x in token.numbers]
        numbers[-1] += " clipped" if token.clipped else ""
        table.add_row(Text(repr(token.text)), *numbers)
    Console(width=max(console.width, WIDTH)).print(table)
    sums = " + ".join(f"{name} {number(value)}" for name, value in told.parts.items())
    console.print(f"\nscore {number(told.score)}, reward {number(told.reward)}, KL {number(told.kl)} nats", highlight=False)
    console.print(f"advantage, mean over tokens: {number(told.advantage)} = {sums}", highlight=False)
