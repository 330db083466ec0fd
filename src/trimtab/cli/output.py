"""What is said on the terminal: help, and how a stage ended."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from trimtab import __version__
from trimtab.algorithms import ALGORITHMS, PREFERENCES
from trimtab.cli.commands import COMMANDS, TOOLS, config_of


def overview() -> str:
    """Every command with what it does."""
    width = max(map(len, [*COMMANDS, *TOOLS])) + 2
    lines = [
        f"trimtab {__version__}: align language models with human preferences",
        "",
        "usage: trimtab COMMAND [recipe.yaml] [key=value ...] [--overwrite]",
        "       trimtab COMMAND --help          every setting of a command",
        "",
        *(line for title, names in _sections() for line in (title, *(f"  {name:<{width}}{what}" for name, what in names.items()), "")),
        "example: trimtab sample prompt='The best thing about the sea is' n=3 sampling.max_tokens=24",
    ]
    return "\n".join(lines)


def help_of(name: str) -> None:
    """Print every setting of a command."""
    from rich.console import Console
    from rich.markup import escape

    from trimtab.config import describe_settings

    config = config_of(name)
    console = Console(highlight=False)
    console.print(f"[bold]trimtab {name}[/]: {COMMANDS[name].what}\n\nusage: trimtab {name} \\[recipe.yaml] \\[key=value ...]\n")
    section = ""
    for row in describe_settings(config):
        head = row.name.rpartition(".")[0]
        if head != section:
            section = head
            console.print(f"\n[bold]{escape(section)}[/]")
        console.print(f"  [cyan]{escape(row.name)}[/] = {escape(row.default)}  [dim]{escape(row.kind)}[/]", soft_wrap=True)
        if row.description:
            console.print(f"      {escape(row.description)}", soft_wrap=True)


def print_result(path: Path, metrics: dict[str, float]) -> None:
    """How a stage ended, and where its report is."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(path), show_header=False, title_justify="left")
    for key, value in metrics.items():
        if not key.startswith("time/"):
            table.add_row(key, f"{value:.4g}")
    Console().print(table)
    print(f"report: {path / 'report.html'}")


def quieten() -> None:
    """transformers' own progress bars and advice do not belong between ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _sections() -> list[tuple[str, dict[str, str]]]:
    """The commands under headings: (heading, name -> what it does)."""
    what = {name: command.what for name, command in COMMANDS.items()}
    teaching = ("sft", "reward", "rejection")
    families = [("improve a policy against a reward", [*ALGORITHMS]), ("learn from preferences directly", [*PREFERENCES])]
    others = [name for name in what if name not in (*teaching, *ALGORITHMS, *PREFERENCES)]
    sections = [("teach a model", [*teaching]), *families, ("sample, judge, measure", others)]
    return [
        *((title, {name: what[name] for name in names}) for title, names in sections),
        ("look into runs, and at the mathematics", {name: tool.what for name, tool in TOOLS.items()}),
    ]
