"""Pages: a template of this folder, filled and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trimtab import snapshot


def render(template: str, output: Path, filters: Mapping[str, Callable[..., Any]] | None = None, **content: Any) -> Path:
    """Fill `template` with `content` and write it to `output`; returns `output`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("trimtab", "runs"), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= dict(filters or {})
    html = environment.get_template(template).render(**content)
    with snapshot.new_file(output, errors="replace") as file:  # a lone surrogate in a sample has no UTF-8
        file.write(html)
    return output
