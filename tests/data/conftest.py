"""Tokenizers and row files for the tests of data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_tokenizers import CHATML, byte_level


@pytest.fixture(scope="session")
def chatml() -> Any:
    return byte_level(CHATML)


@pytest.fixture(scope="session")
def plain() -> Any:
    return byte_level(eos="<|endoftext|>")


@pytest.fixture
def rows(tmp_path: Path) -> Callable[..., str]:
    """Writes rows to a JSONL file and names it."""

    def write(*values: Any, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
        return str(path)

    return write
