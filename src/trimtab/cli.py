"""The command line. Everything heavy is imported only by the command that needs it."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab import __version__, memory
from trimtab.algorithms import ALGORITHMS, PREFERENCES
from trimtab.errors import ConfigError, TrimtabError


@dataclass(frozen=True)
class Command:
    """One word of the command line. `config` and `run` are "module:name"; `what` goes into the list of commands."""

    what: str
    config: str
    run: str
    kind: str = "stage"  # stage: writes a run directory; action: does something and prints
    first: str = ""  # module:name of what turns a first word that is no recipe into settings
    named: bool = False  # config(name) gives the recipe's type, and run(name, ...) runs it: one stage for many algorithms


COMMANDS = {
    "sft": Command("fine-tune on demonstrations", "trimtab.stages.sft:SFTConfig", "trimtab.stages.sft:sft"),
    "reward": Command("train a reward model on comparisons", "trimtab.stages.reward:RewardModelConfig", "trimtab.stages.reward:reward"),
    **{
        name: Command(entry.what, "trimtab.stages.policy:policy_config", "trimtab.stages.policy:policy", named=True)
        for name, entry in ALGORITHMS.items()
    },
    **{
        name: Command(entry.what, "trimtab.stages.preference:preference_config", "trimtab.stages.preference:preference", named=True)
        for name, entry in PREFERENCES.items()
    },
    "rejection": Command(
        "fine-tune on the best of n own responses, in rounds",
        "trimtab.stages.rejection:RejectionConfig",
        "trimtab.stages.rejection:rejection",
    ),
    "evaluate": Command(
        "held-out reward, KL and win rate against another model",
        "trimtab.stages.evaluate:EvaluateConfig",
        "trimtab.stages.evaluate:evaluate",
    ),
    "audit": Command(
        "where a reward model is right, how sure it is, and whether length decides",
        "trimtab.stages.audit:AuditConfig",
        "trimtab.cli:_audit",
        "action",
    ),
    "implicit-reward": Command(
        "the reward a policy is optimal for, read from the policy",
        "trimtab.stages.implicit:ImplicitConfig",
        "trimtab.stages.implicit:implicit_reward",
        "action",
    ),
    "sample": Command("sample responses, or keep the best of n", "trimtab.stages.sample:SampleConfig", "trimtab.cli:_sample", "action"),
    "judge": Command(
        "compare samples with a language model as the judge", "trimtab.stages.judge:JudgeConfig", "trimtab.stages.judge:judge", "action"
    ),
    "serve-reward": Command(
        "serve a reward model or a function over HTTP: trimtab serve-reward FOLDER|file.py:name [key=value ...]",
        "trimtab.stages.serve:ServeConfig",
        "trimtab.stages.serve:serve",
        "action",
        first="trimtab.stages.serve:named",
    ),
    "annotate": Command(
        "compare samples with the simulated annotator", "trimtab.demo.annotate:AnnotateConfig", "trimtab.demo.annotate:annotate", "action"
    ),
    "merge": Command(
        "merge a LoRA adapter into its base model", "trimtab.models.merge:MergeConfig", "trimtab.models.merge:merge", "action"
    ),
    "demo": Command(
        "the whole story on a small model, in about seven minutes", "trimtab.demo.story:DemoConfig", "trimtab.demo.story:demo", "action"
    ),
}
TOOLS = {
    "exact": "hold every algorithm against the exact optimum: trimtab exact [--algorithm A] [--quick] [--json] [--output FOLDER]",
    "explain": "one step of a policy run, token by token: trimtab explain RUN STEP [--response N]",
    "plan": "what a recipe needs, and whether it fits: trimtab plan COMMAND [recipe.yaml] [key=value ...]",
    "resume": "go on with a run from its newest whole checkpoint: trimtab resume RUN [key=value ...] [--allow-changed]",
    "report": "rebuild RUN/report.html, or compare several runs: trimtab report RUN [RUN...] [--output FILE]",
    "schema": "print the JSON schema of a command's recipe: trimtab schema COMMAND",
}


FREE_TO_CHANGE = {"output", "resume", "trackers", "checkpoint"}
"""Settings that change no number of a run."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 well, 2 an error the user can mend, 130 interrupted)."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(argv)
    except TrimtabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not memory.ran_out(error):
            raise
        print(f"error: {memory.shortage(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupted:
        print("interrupted; what was written so far is kept, and `trimtab resume` goes on with it", file=sys.stderr)
        return 128 + getattr(interrupted, "signal", 2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if argv[0] in ("-V", "--version", "version"):
        print(f"trimtab {__version__}")
        return 0
    name, rest = argv[0], argv[1:]
    wants_help = any(word in ("-h", "--help") for word in rest)
    if name in TOOLS:
        if wants_help:
            print(f"trimtab {name}: {TOOLS[name]}")
            return 0
        return {"exact": _exact, "explain": _explain, "plan": _plan, "report": _report, "resume": _resume, "schema": _schema}[name](rest)
    if name not in COMMANDS:
        raise _unknown(name)
    if wants_help:
        _command_help(name)
        return 0
    return _run(name, rest)


def _run(name: str, words: list[str]) -> int:
    from trimtab.config import load_recipe
    from trimtab.runs.directory import RunDirectory

    command = COMMANDS[name]
    overwrite = "--overwrite" in words
    words = [word for word in words if word != "--overwrite"]
    recipe = None
    if words and "=" not in words[0] and not words[0].startswith("--"):
        first = words.pop(0)
        if command.first and not first.endswith((".yaml", ".yml")):
            words = [*_load(command.first)(first), *words]
        else:
            recipe = Path(first)
    for word in words:
        if word.startswith("--"):
            raise ConfigError(
                f"unknown option {word!r}", where="command line", fix="settings are written key=value; the only option is --overwrite"
            )
    _quieten()
    config = load_recipe(_config_of(name), recipe, words)
    if command.kind == "action":
        _load(command.run)(config)
        return 0
    if config.resume == "auto":
        RunDirectory.recover(config.output)
    there = (Path(config.output) / "config.yaml").exists()
    if config.resume == "auto" and there and not overwrite:
        return _go_on(name, config, allow_changed=False)
    return _stage(name, config, overwrite=overwrite)


def _stage(name: str, config: Any, *, overwrite: bool = False, resume: bool = False) -> int:
    from trimtab.config import to_yaml
    from trimtab.runs.session import session

    command, run = COMMANDS[name], _load(COMMANDS[name].run)
    how = {"trackers": config.trackers, "overwrite": overwrite, "resume": resume}
    written = to_yaml(config)
    config = config.model_copy(update={"resume": "auto"}) if resume else config
    with session(name, config.output, written, **how) as directory:
        metrics = run(name, config, directory.path, directory) if command.named else run(config, directory.path, directory)
    if resume and not metrics:
        print(f"{config.output}: nothing was left to do", file=sys.stderr)
    _print_result(directory.path, metrics)
    return 0


def _resume(words: list[str]) -> int:
    from trimtab.config import load_recipe
    from trimtab.runs.directory import RunDirectory

    usage = "trimtab resume RUN [key=value ...] [--allow-changed]"
    allow_changed = "--allow-changed" in words
    words = [word for word in words if word != "--allow-changed"]
    if not words or "=" in words[0] or any(word.startswith("--") for word in words):
        raise ConfigError("name a run", where="command line", fix=usage)
    RunDirectory.recover(words[0])
    run = RunDirectory.open(words[0])
    stage = next((event["stage"] for event in run.events() if event["event"] == "started"), None)
    if stage not in COMMANDS:
        raise ConfigError("the run does not say which stage it is", where=words[0], fix="start it anew")
    _quieten()
    config = load_recipe(_config_of(stage), run.path / "config.yaml", [*words[1:], f"output={run.path}"])
    return _go_on(stage, config, allow_changed=allow_changed)


def _go_on(name: str, config: Any, *, allow_changed: bool) -> int:
    """Resume the run in config.output with this recipe. Raises ConfigError for settings that would make it another run."""
    from trimtab.config import load_recipe
    from trimtab.runs.trackers import flatten

    before, after = (
        flatten(recipe.model_dump(mode="json"))
        for recipe in (load_recipe(_config_of(name), Path(config.output) / "config.yaml", []), config)
    )
    changed = [
        f"{key} (was {before.get(key)!r}, is {after.get(key)!r})"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key) and key.split(".")[0] not in FREE_TO_CHANGE
    ]
    if changed and not allow_changed:
        raise ConfigError(
            f"the continuation would not be the same run, because of {'; '.join(changed)}",
            where=str(config.output),
            fix=f"set them as they were, or `trimtab resume {config.output} ... --allow-changed`",
        )
    return _stage(name, config, resume=True)


def _config_of(name: str) -> Any:
    found = _load(COMMANDS[name].config)
    return found(name) if COMMANDS[name].named else found


def _load(place: str) -> Callable[..., Any]:
    module, _, attribute = place.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return loaded


def _quieten() -> None:
    """transformers' own progress bars and advice do not belong between ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with suppress(ImportError):
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()


def _print_result(path: Path, metrics: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(path), show_header=False, title_justify="left")
    for key, value in metrics.items():
        if not key.startswith("time/"):
            table.add_row(key, f"{value:.4g}")
    Console().print(table)
    print(f"report: {path / 'report.html'}")


def _sample(config: Any) -> None:
    from trimtab.stages.sample import sample

    for group in sample(config):
        if config.output is None:
            for response in group.responses:
                print(
                    json.dumps(
                        {"prompt": group.prompt.as_text, "response": response.text, "truncated": response.truncated}, ensure_ascii=False
                    )
                )


def _audit(config: Any) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from trimtab.stages.audit import audit, table_rows

    result = audit(config)
    table = Table(
        "", "estimate", "95 % interval", "n", title=f"{escape(config.model)}: {result['n']} {result['judgements']}", title_justify="left"
    )
    for name, found in table_rows(result):
        numbers = found or {}
        interval = f"{numbers['low']:.3g} to {numbers['high']:.3g}" if "low" in numbers else ""
        table.add_row(
            escape(name), f"{numbers['estimate']:.4g}" if found else "not to be had from these data", interval, str(numbers.get("n", ""))
        )
    Console().print(table)
    print(f"{Path(config.output) / 'audit.json'}")


def _exact(words: list[str]) -> int:
    _quieten()
    from trimtab.exact.command import exact

    return exact(words)


def _explain(words: list[str]) -> int:
    from trimtab.runs.explain import explain

    usage, response = "trimtab explain RUN STEP [--response N]", None
    if "--response" in words:
        at = words.index("--response")
        response, words = (words[at + 1] if at + 1 < len(words) else ""), words[:at] + words[at + 2 :]
    if len(words) != 2 or not words[1].isdigit() or not (response is None or response.isdigit()):
        raise ConfigError("name a run and a step", where="command line", fix=usage)
    print(f"page: {explain(Path(words[0]), int(words[1]), response=None if response is None else int(response))}")
    return 0


def _report(words: list[str]) -> int:
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


def _plan(words: list[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    from trimtab.config import load_recipe
    from trimtab.stages.plan import plan, rows_of

    if not words or words[0] not in COMMANDS:
        raise ConfigError("name a command", where="command line", fix="trimtab plan COMMAND [recipe.yaml] [key=value ...]")
    name, *rest = words
    recipe = Path(rest.pop(0)) if rest and "=" not in rest[0] else None
    _quieten()
    table = Table(title=f"trimtab {name}", show_header=False, title_justify="left")
    for row in rows_of(plan(load_recipe(_config_of(name), recipe, rest))):
        table.add_row(*row)
    Console().print(table)
    return 0


def _schema(words: list[str]) -> int:
    from trimtab.config import json_schema

    if len(words) != 1 or words[0] not in COMMANDS:
        raise ConfigError("name one command", where="command line", fix=f"trimtab schema {{{','.join(COMMANDS)}}}")
    print(json_schema(_config_of(words[0])))
    return 0


def _help() -> str:
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


def _sections() -> list[tuple[str, dict[str, str]]]:
    """The commands under headings: (heading, name -> what it does)."""
    what = {name: command.what for name, command in COMMANDS.items()}
    teaching = ("sft", "reward", "rejection")
    families = [("improve a policy against a reward", [*ALGORITHMS]), ("learn from preferences directly", [*PREFERENCES])]
    others = [name for name in what if name not in (*teaching, *ALGORITHMS, *PREFERENCES)]
    sections = [("teach a model", [*teaching]), *families, ("sample, judge, measure", others)]
    return [
        *((title, {name: what[name] for name in names}) for title, names in sections),
        ("look into runs, and at the mathematics", TOOLS),
    ]


def _command_help(name: str) -> None:
    from rich.console import Console
    from rich.markup import escape

    from trimtab.config import describe_settings

    config = _config_of(name)
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


def _unknown(name: str) -> ConfigError:
    import difflib

    near = difflib.get_close_matches(name, [*COMMANDS, *TOOLS], n=1)
    fix = f"did you mean {near[0]!r}?" if near else f"commands are: {', '.join([*COMMANDS, *TOOLS])}"
    return ConfigError(f"there is no command {name!r}", where="command line", fix=fix)


if __name__ == "__main__":
    sys.exit(main())
