"""Recipes: what is written is what is run, and a mistake is named with its mend."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import Field

from trimtab.config import Config, describe_settings, json_schema, load_recipe, to_yaml
from trimtab.errors import ConfigError


class InnerConfig(Config):
    rate: float = Field(0.5, gt=0, description="how fast")
    names: list[str] = Field(default_factory=list)


class OuterConfig(Config):
    inner: InnerConfig = Field(default_factory=lambda: InnerConfig(rate=0.25))
    maybe: InnerConfig | None = None
    count: int = Field(3, ge=1)
    path: str = Field(description="where")


def load(tmp_path: Path, text: str, *overrides: str) -> OuterConfig:
    (tmp_path / "recipe.yaml").write_text(text)
    return load_recipe(OuterConfig, tmp_path / "recipe.yaml", overrides)


def test_overrides_win_and_the_resolved_recipe_loads_back_equal(tmp_path: Path) -> None:
    config = load(tmp_path, "path: here\ninner: {rate: 1e-3}\n", "count=5", "inner.names=[a, b]", "maybe.rate=2")
    assert (config.inner.rate, config.inner.names, config.count, config.maybe) == (1e-3, ["a", "b"], 5, InnerConfig(rate=2))
    assert load(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("path: x\ncuont: 3", (), "unknown setting 'cuont'.*did you mean 'count'"),
        ("path: x", ("inner.rat=1",), "unknown setting 'inner.rat'.*did you mean 'inner.rate'"),
        ("path: x\nrate: 1", (), "unknown setting 'rate'.*did you mean 'inner.rate'"),
        ("count: 3", (), "'path' is required.*set path"),
        ("path: x\ncount: 0", (), "'count' should be greater than or equal to 1.*got 0"),
        ("path: x\ncount: three", (), "'count' should be a valid integer.*got 'three'"),
        ("path: x\ninner: {rate: .nan}", (), "'inner.rate' should be a finite number"),
        ("- a\n- b", (), "a recipe is a mapping"),
        ("path: [x", (), r"recipe.yaml:\d+: not valid YAML"),
        ("path: x", ("count",), "'count' is not a setting.*key=value"),
        ("path: x", ("path.deeper=1",), "path is a single value"),
    ],
)
def test_a_mistake_is_one_error_that_names_it(tmp_path: Path, text: str, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load(tmp_path, text, *overrides)


def test_files_that_are_no_recipe_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes("path: caf\xe9".encode("latin-1"))
    for path, message in ((tmp_path / "none.yaml", "no such recipe"), (tmp_path, "a folder"), (tmp_path / "latin.yaml", "UTF-8")):
        with pytest.raises(ConfigError, match=message):
            load_recipe(OuterConfig, path)


def test_help_shows_the_default_that_is_really_used() -> None:
    shown = {setting.name: setting.default for setting in describe_settings(OuterConfig)}
    assert shown == {
        "inner.rate": "0.25",
        "inner.names": "[]",
        "maybe.rate": "0.5",
        "maybe.names": "[]",
        "count": "3",
        "path": "(required)",
    }


def test_schema_is_json_with_descriptions() -> None:
    schema = json.loads(json_schema(OuterConfig))
    assert schema["properties"]["path"]["description"] == "where"
    assert schema["additionalProperties"] is False
