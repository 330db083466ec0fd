"""Imports go only from a later layer to an earlier one, and heavy packages stay behind the wall that bears their name."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "trimtab"
LAYERS = [
    "errors", "interrupt", "memory", "types", "seeds", "batch", "protocols", "config", "places", "snapshot", "kernels", "maths", "data",
    "models", "engines", "rewards", "algorithms", "training", "stages", "runs", "demo", "exact", "cli",
]  # fmt: skip
SIBLINGS = {
    "algorithms": {"base", "group"},
    "engines": {"batching", "cache", "decoder", "drafts", "sampling"},
    "rewards": {"numerals", "sandbox"},
    "stages": {"common", "actor_critic", "policy_metrics", "explanation", "sample", "overlap"},
}
"""Folders whose files do not import each other, and the files there that are made to be shared."""
WALLS = {
    "wandb": "runs/trackers/wandb.py", "mlflow": "runs/trackers/mlflow.py", "tensorboard": "runs/trackers/tensorboard.py",
    "vllm": "engines/vllm.py", "ray": "scale", "fastapi": "feedback", "vaderSentiment": "demo/annotator.py", "datasets": "data/readers.py",
    "pyarrow": "data/readers.py", "matplotlib": "runs/charts.py", "peft": "models/loading.py",
}  # fmt: skip
TORCHLESS = [
    "errors",
    "interrupt",
    "memory",
    "types",
    "seeds",
    "config",
    "runs",
    "runs.directory",
    "runs.report",
    "cli",
    "cli.recipes",
    "cli.tools",
]


def imports(path: Path) -> list[tuple[str, ast.AST]]:
    """Modules a file imports, `from a import b` as both a and a.b."""
    found: list[tuple[str, ast.AST]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(name.name, node) for name in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(node.module, node), *((f"{node.module}.{name.name}", node) for name in node.names)]
    return found


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def layer(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "trimtab" and len(parts) > 1 else None


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    own = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    assert own in LAYERS, f"{own} is not in the table of layers"
    for module, _ in imports(path):
        other = layer(module)
        if other in LAYERS and other != own:
            assert LAYERS.index(other) < LAYERS.index(own), f"{own} must not import {module}"


@pytest.mark.parametrize("folder", SIBLINGS)
def test_siblings_do_not_import_each_other(folder: str) -> None:
    for path in (SOURCE / folder).glob("*.py"):
        if path.stem == "__init__":
            continue
        for module, _ in imports(path):
            parts = module.split(".")
            if parts[:2] == ["trimtab", folder] and len(parts) > 2 and (SOURCE / folder / f"{parts[2]}.py").exists():
                assert parts[2] in SIBLINGS[folder] | {path.stem}, f"{folder}/{path.name} must not import {module}"


def test_algorithms_see_no_model_engine_or_disk() -> None:
    for path in (SOURCE / "algorithms").glob("*.py"):
        seen = {layer(module) for module, _ in imports(path)} | {module.split(".")[0] for module, _ in imports(path)}
        assert not seen & {"models", "engines", "data", "rewards", "os", "pathlib", "transformers"}, path.name


def test_heavy_packages_stay_behind_their_walls() -> None:
    for path in files():
        place = path.relative_to(SOURCE).as_posix()
        for module, _ in imports(path):
            wall = WALLS.get(module.split(".")[0])
            if wall:
                assert place.startswith(wall), f"{place} imports {module}, which belongs in {wall}"


@pytest.mark.parametrize("module", TORCHLESS)
def test_what_needs_no_torch_imports_none(module: str) -> None:
    code = f"import sys, trimtab.{module}; sys.exit(bool({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
