"""Commands that look, measure and print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.cli.commands import COMMANDS, config_of
from trimtab.cli.output import quieten
from trimtab.errors import ConfigError


def sample(config: Any) -> None:
    from trimtab.stages import sample as stage

    for group in stage.sample(config):
        if config.output is None:
            for response in group.responses:
                print(
                    json.dumps(
                        {"prompt": group.prompt.as_text, "response": response.text, "truncated": response.truncated}, ensure_ascii=False
                    )
                )


def audit(config: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from trimtab.stages import audit as stage

    result = stage.audit(config)
    table = Table(
        "", "estimate", "95 % interval", "n", title=f"{escape(config.model)}: {result['n']} {result['judgements']}", title_justify="left"
    )
    for name, found in stage.table_rows(result):
        numbers = found or {}
        interval = f"{numbers['low']:.3g} to {numbers['high']:.3g}" if "low" in numbers else ""
        table.add_row(
            escape(name), f"{numbers['estimate']:.4g}" if found else "not to be had from these data", interval, str(numbers.get("n", ""))
        )
    Console().print(table)
    print(f"{Path(config.output) / 'audit.json'}")


def exact(words: list[str]) -> int:
    quieten()
    from trimtab.exact import command

    return command.exact(words)


def explain(words: list[str]) -> int:
    from trimtab.runs import explain as pages

    usage, response = "trimtab explain RUN STEP [--response N]", None
    if "--response" in words:
        at = words.index("--response")
        response, words = (words[at + 1] if at + 1 < len(words) else ""), words[:at] + words[at + 2 :]
    if len(words) != 2 or not words[1].isdigit() or not (response is None or response.isdigit()):
        raise ConfigError("name a run and a step", where="command line", fix=usage)
    print(f"page: {pages.explain(Path(words[0]), int(words[1]), response=None if response is None else int(response))}")
    return 0


def report(words: list[str]) -> int:
    from trimtab.runs.report import write_report

    output: Path | None = None
    if "--output" in words:
        at = words.index("--output")
        if at + 1 == len(words):
            raise ConfigError("--output needs a file", where="command line", fix="trimtab report RUN --output report.html")
        output = Path(words[at + 1])
        del words[at : at + 2]
    if not words:
        raise ConfigError("no run was named", where="command line", fix="trimtab report RUN [RUN...]")
    runs = [Path(word) for word in words]
    output = output or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    print(write_report(runs, output))
    return 0


def plan(words: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from trimtab.config import load_recipe
    from trimtab.stages import plan as planning

    if not words or words[0] not in COMMANDS:
        raise ConfigError("name a command", where="command line", fix="trimtab plan COMMAND [recipe.yaml] [key=value ...]")
    name, *rest = words
    recipe = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    quieten()
    table = Table(title=f"trimtab {name}", show_header=False, title_justify="left")
    for row in planning.rows_of(planning.plan(load_recipe(config_of(name), recipe, rest))):
        table.add_row(*row)
    Console().print(table)
    return 0


def schema(words: list[str]) -> int:
    from trimtab.config import json_schema

    if len(words) != 1 or words[0] not in COMMANDS:
        raise ConfigError("name one command", where="command line", fix=f"trimtab schema {{{','.join(COMMANDS)}}}")
    print(json_schema(config_of(words[0])))
    return 0
