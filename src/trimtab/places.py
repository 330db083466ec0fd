"""Where trimtab keeps things on this machine."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$TRIMTAB_CACHE, or trimtab/ in the user's cache folder."""
    if "TRIMTAB_CACHE" in os.environ:
        return Path(os.environ["TRIMTAB_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trimtab"
