"""Commands with a recipe: run, and gone on with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trimtab.cli.commands import COMMANDS, config_of, load
from trimtab.cli.output import print_result, quieten
from trimtab.errors import ConfigError

FREE_TO_CHANGE = {"output", "resume", "trackers", "checkpoint"}
"""Settings that change no number of a run."""


def run(name: str, words: list[str]) -> int:
    """Run a command with its recipe and settings; returns the exit status."""
    from trimtab.config import load_recipe
    from trimtab.runs.directory import RunDirectory

    command = COMMANDS[name]
    overwrite = "--overwrite" in words
    words = [word for word in words if word != "--overwrite"]
    recipe = None
    if words and "=" not in words[0] and not words[0].startswith("--"):
        first = words.pop(0)
        if command.first and not first.endswith((".yaml", ".yml")):
            words = [*load(command.first)(first), *words]
        else:
            recipe = Path(first)
    for word in words:
        if word.startswith("--"):
            raise ConfigError(
                f"unknown option {word!r}", where="command line", fix="settings are written key=value; the only option is --overwrite"
            )
    quieten()
    config = load_recipe(config_of(name), recipe, words)
    if command.kind == "action":
        load(command.run)(config)
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

    command, work = COMMANDS[name], load(COMMANDS[name].run)
    how = {"trackers": config.trackers, "overwrite": overwrite, "resume": resume}
    written = to_yaml(config)
    config = config.model_copy(update={"resume": "auto"}) if resume else config
    with session(name, config.output, written, **how) as directory:
        metrics = work(name, config, directory.path, directory) if command.named else work(config, directory.path, directory)
    if resume and not metrics:
        print(f"{config.output}: nothing was left to do", file=sys.stderr)
    print_result(directory.path, metrics)
    return 0


def resume(words: list[str]) -> int:
    """Go on with the run that is named; returns the exit status."""
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
    quieten()
    config = load_recipe(config_of(stage), run.path / "config.yaml", [*words[1:], f"output={run.path}"])
    return _go_on(stage, config, allow_changed=allow_changed)


def _go_on(name: str, config: Any, *, allow_changed: bool) -> int:
    """Resume the run in config.output with this recipe. Raises ConfigError for settings that would make it another run."""
    from trimtab.config import load_recipe
    from trimtab.runs.trackers import flatten

    before, after = (
        flatten(recipe.model_dump(mode="json"))
        for recipe in (load_recipe(config_of(name), Path(config.output) / "config.yaml", []), config)
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
