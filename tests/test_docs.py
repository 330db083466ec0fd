"""The pages name everything that exists, and nothing that does not."""

from __future__ import annotations

import importlib
import inspect
import re
import shlex
from functools import reduce
from pathlib import Path

import pytest

from trimtab.algorithms import ALGORITHMS, PREFERENCES
from trimtab.cli.commands import COMMANDS, TOOLS, config_of
from trimtab.config import load_recipe, settings_of

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "docs" / name for name in ("mathematics.md", "textbook.md") if (ROOT / "docs" / name).exists()]
MATHEMATICS = (ROOT / "docs" / "mathematics.md").read_text()
LOSS_MODULES = [
    "advantages", "best_of_n", "ensembles", "full_kl", "kl", "optimum", "policy_losses", "preference_losses", "reductions", "reward_losses",
    "value_losses",
]  # fmt: skip


def public_functions(module: str) -> list[str]:
    loaded = importlib.import_module(f"trimtab.maths.{module}")
    return [
        name
        for name, found in vars(loaded).items()
        if inspect.isfunction(found) and found.__module__ == loaded.__name__ and not name.startswith("_")
    ]


def test_every_loss_module_of_the_mathematics_is_looked_at() -> None:
    named = {path.stem for path in (ROOT / "src" / "trimtab" / "maths").glob("*_losses.py")}
    assert named <= set(LOSS_MODULES)


@pytest.mark.parametrize("module", LOSS_MODULES)
def test_every_public_function_is_on_the_page(module: str) -> None:
    missing = [name for name in public_functions(module) if f"`maths.{module}:{name}`" not in MATHEMATICS]
    assert public_functions(module)
    assert not missing


@pytest.mark.parametrize("name", [*ALGORITHMS, *PREFERENCES])
def test_every_registered_name_has_a_row(name: str) -> None:
    assert re.search(rf"^\| `{name}`", MATHEMATICS, re.MULTILINE)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_algorithms_row_names_its_class(name: str) -> None:
    place = ALGORITHMS[name].place.removeprefix("trimtab.")
    assert f"| `{name}` (`{place}`)" in MATHEMATICS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_place_named_exists(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    places = set(re.findall(r"`([a-z_]+(?:\.[a-z_]+)*):([A-Za-z_][\w.]*)`", text))
    assert places
    for module, name in places:
        found = reduce(getattr, name.split("."), importlib.import_module(f"trimtab.{module}"))
        assert callable(found), f"{module}:{name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_named_exists(page: Path) -> None:
    text = page.read_text()
    files = {*re.findall(r"`(tests/[\w./]+)`", text), *re.findall(r"\((?!https?:)([\w./]+\.md)\)", text)}
    assert files
    for file in files:
        assert (ROOT / file).exists() or (page.parent / file).exists(), file


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_formulas_and_tables_are_whole(page: Path) -> None:
    """Every line has its formulas closed, and every row of a table as many cells as its head: a bar in a formula would cut it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    inline = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    cells = 0
    for line in inline.splitlines():
        assert line.count("$") % 2 == 0, line
        if line.startswith("|"):
            cells = cells or line.count("|")
            assert line.count("|") == cells, line
        else:
            cells = 0


def test_the_table_of_algorithms_is_the_registry() -> None:
    text = (ROOT / "docs" / "stages.md").read_text()
    table = text.partition("| name | what differs")[2].partition("\n\n")[0]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == list(ALGORITHMS)


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda recipe: recipe.stem)
def test_every_recipe_is_valid_and_shows_its_command(recipe: Path) -> None:
    lines = [line.removeprefix("#   ") for line in recipe.read_text().splitlines()]
    [example] = [shlex.split(line) for line in lines if line.startswith(f"trimtab {recipe.stem} ")]
    assert example[2] == f"recipes/{recipe.name}"
    load_recipe(config_of(recipe.stem), recipe, example[3:])


def test_the_readme_counts_and_names_what_there_is() -> None:
    text = (ROOT / "README.md").read_text()
    assert f"PPO has {len(list(settings_of(config_of('ppo'))))} settings" in text
    assert f"{len(ALGORITHMS) - 1} other algorithms" in text
    assert f"{len(PREFERENCES) - 1} other losses" in text
    named = set(re.findall(r"^\| `trimtab ([\w-]+)`", text, re.MULTILINE))
    assert named == ({*COMMANDS, *TOOLS} - {*ALGORITHMS, *PREFERENCES}) | {"ppo", "dpo"}
    links = re.findall(r"\]\((?!https?:)([\w./]+)", text)
    assert all((ROOT / link).exists() for link in links)
