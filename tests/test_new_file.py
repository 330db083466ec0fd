"""A file is there whole or not at all, and what a killed writer has left does not stay."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import snapshot

KILLED = """
import os, signal, sys
from pathlib import Path
from trimtab import snapshot
with snapshot.new_file(Path(sys.argv[1])) as file:
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_writer_left_goes_with_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False).returncode == -signal.SIGKILL
    (left,) = set(tmp_path.iterdir()) - {path}
    assert left.read_text() == "half"
    assert path.read_text() == "old"
    foreign = [tmp_path / ".rows.jsonl.notes", tmp_path / ".other.jsonl.1", tmp_path / f".rows.jsonl.{os.getppid()}"]  # the last one lives
    for other in foreign:
        other.touch()
    with snapshot.new_file(path) as file:
        file.write("new")
    assert path.read_text() == "new"
    assert set(tmp_path.iterdir()) == {path, *foreign}


def test_what_is_raised_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), snapshot.new_file(path) as file:
        file.write("\ud800")
    with snapshot.new_file(tmp_path / "replaced.html", errors="replace") as file:
        file.write("\ud800")
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"page.html": "old", "replaced.html": "?"}
