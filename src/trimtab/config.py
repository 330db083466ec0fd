"""Recipes: YAML <-> frozen, validated, typed settings.

Every module that has settings declares a `Config` next to the code it sets. A recipe is one `Config` of a stage, read from
YAML, with `dotted.key=value` overrides on top. An unknown key, a wrong type or a value out of range is an error that
names the setting, says what is allowed, and suggests the nearest name.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from trimtab.errors import ConfigError


class Config(BaseModel):
    """Base of all settings: frozen, and no key is accepted that is not declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def load_recipe(kind: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Read a recipe file (or none) and apply `dotted.key=value` overrides, whose values are YAML.

    Raises ConfigError naming the file, the setting and the fix.
    """
    settings: dict[str, Any] = {} if path is None else _read_yaml(path)
    for override in overrides:
        _apply(settings, override)
    return validate(kind, settings, source=str(path) if path else "settings")


def validate(kind: type[C], settings: dict[str, Any], *, source: str) -> C:
    """Turn a nested dictionary into a `kind`, or raise one ConfigError that lists every problem."""
    try:
        return kind.model_validate(settings)
    except ValidationError as error:
        problems = [_explain(kind, problem) for problem in error.errors(include_url=False)]
        what = "; ".join(what for what, _ in problems)
        fixes = dict.fromkeys(fix for _, fix in problems if fix)
        raise ConfigError(what, where=source, fix="; ".join(fixes) or None) from None


def to_yaml(config: Config) -> str:
    """The complete, resolved settings as YAML: `load_recipe` of it gives an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema(kind: type[Config]) -> str:
    """JSON schema for editors (completion and checks while a recipe is written)."""
    return json.dumps(kind.model_json_schema(), indent=2)


def settings_of(kind: type[Config], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every leaf setting as (dotted name, field), in the order of declaration."""
    for name, field in kind.model_fields.items():
        nested = _nested(field.annotation)
        if nested is not None:
            yield from settings_of(nested, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


@dataclass(frozen=True)
class Setting:
    """One line of a command's help: dotted name, default as YAML, type in words, description."""

    name: str
    default: str
    kind: str
    description: str


def describe_settings(kind: type[Config]) -> Iterator[Setting]:
    """Every leaf setting with the default it really has, also where an outer config changes an inner one's default."""
    for name, field in settings_of(kind):
        default: Any = kind
        for part in name.split("."):
            owner = default
            default = _default_of(owner, part)
        shown = "(required)" if default is PydanticUndefined else json.dumps(_plain(default), ensure_ascii=False)
        yield Setting(name, shown, ", ".join([_in_words(field.annotation), *_constraints(field)]), field.description or "")


def _default_of(owner: Any, part: str) -> Any:
    """The default of a setting: read from an instance where there is one, else from the class."""
    kind = type(owner) if isinstance(owner, Config) else owner
    if not (isinstance(kind, type) and issubclass(kind, Config)):
        return PydanticUndefined
    field = kind.model_fields[part]
    nested = _nested(field.annotation)
    if isinstance(owner, Config):
        value = getattr(owner, part)
    elif field.is_required():
        value = PydanticUndefined if nested is None else None
    else:
        value = field.get_default(call_default_factory=True)
    return nested if value is None and nested is not None else value


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Config) else value


def _in_words(annotation: Any) -> str:
    """A type as a user would say it: `str | null`, `token | sequence`, `list[str]`."""
    inner, origin = get_args(annotation), get_origin(annotation)
    if annotation is type(None):
        return "null"
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin in (Union, UnionType):
        return " | ".join(map(_in_words, inner))
    name = getattr(origin or annotation, "__name__", str(annotation))
    return f"{name}[{', '.join(map(_in_words, inner))}]" if inner else name


def _constraints(field: FieldInfo) -> list[str]:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    return [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs.items() if getattr(m, name, None) is not None]


def _nested(annotation: Any) -> type[Config] | None:
    """The Config class inside an annotation such as `Config` or `Config | None`, if there is exactly one."""
    candidates = [annotation, *get_args(annotation)]
    found = [c for c in candidates if isinstance(c, type) and issubclass(c, Config)]
    return found[0] if len(found) == 1 and getattr(annotation, "__origin__", None) not in (list, tuple) else None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("there is no such recipe", where=str(path), fix="check the path; recipes/ holds examples") from None
    except IsADirectoryError:
        raise ConfigError("this is a folder, not a recipe", where=str(path), fix="name a .yaml file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"not valid UTF-8 ({error.reason} at byte {error.start})", where=str(path), fix="save the recipe as UTF-8"
        ) from None
    try:
        settings = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"not valid YAML: {getattr(error, 'problem', error)}", where=place, fix="correct the YAML") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError("a recipe is a mapping of settings", where=str(path), fix="write lines such as `model: {path: ...}`")
    return settings


def _apply(settings: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r} is not a setting", where="command line", fix="write key=value, for example optim.lr=1e-5")
    *parents, leaf = key.split(".")
    node = settings
    for parent in parents:
        child = node.setdefault(parent, {})
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            raise ConfigError(f"{parent} is a single value, it has no setting {leaf!r} inside", where=f"command line, {override}")
        node = child
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value is not valid YAML: {error}", where=f"command line, {override}", fix="quote the value") from None


def _explain(kind: type[Config], problem: Any) -> tuple[str, str | None]:
    """One validation problem as (what is wrong, how to mend it)."""
    location = [part for part in problem["loc"] if not (isinstance(part, str) and part.endswith("Config"))]
    name = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        known = [dotted for dotted, _ in settings_of(kind)]
        same_leaf = [dotted for dotted in known if dotted.split(".")[-1] == name.split(".")[-1]]
        near = same_leaf[:1] or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        parent = name.rpartition(".")[0]
        siblings = sorted(
            {dotted[len(parent) + 1 :].split(".")[0] for dotted in known if dotted.startswith(f"{parent}.")}
            if parent
            else {d.split(".")[0] for d in known}
        )
        fix = f"did you mean {near[0]!r}?" if near else f"settings here are: {', '.join(siblings)}"
        return f"unknown setting {name!r}", fix
    if problem["type"] == "missing":
        return f"setting {name!r} is required", f"set {name}"
    message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if not name:
        return message, "change one of the settings it names"
    described = next((field.description for dotted, field in settings_of(kind) if dotted == name), None)
    fix = f"{name} is: {described}" if described else f"correct {name}"
    return f"setting {name!r} {message[0].lower()}{message[1:]} (got {problem['input']!r})", fix
