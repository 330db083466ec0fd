"""Other places a run can report to. Each receives the same stream as the run directory, and is optional.

All of them stay on this machine by default; nothing is sent anywhere unless WANDB_MODE or MLFLOW_TRACKING_URI says so.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import ConfigError

if TYPE_CHECKING:
    from trimtab.protocols import Tracker

TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandbTracker", "mlflow": "MlflowTracker"}
"""Name in a recipe (also that of the file and of the package it needs) and class."""


def make(names: Sequence[str], folder: Path, run_name: str, config: Mapping[str, Any]) -> list[Tracker]:
    """The trackers of these names, which keep their files in `folder`.

    Raises ConfigError for an unknown name, and for a package that is not installed.
    """
    for name in names:
        if name not in TRACKERS:
            near = difflib.get_close_matches(name, TRACKERS, n=1)
            fix = f"did you mean {near[0]!r}?" if near else f"choose from: {', '.join(TRACKERS)}"
            raise ConfigError(f"there is no tracker {name!r}", where="trackers", fix=fix)
    return [_load(name)(folder, run_name, config) for name in dict.fromkeys(names)]


def _load(name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"trimtab.runs.trackers.{name}"), TRACKERS[name])
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tracker {name!r} needs the package {error.name!r}", where="trackers", fix="pip install 'trimtab[track]'"
        ) from None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as {"dotted.name": value}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return flat
