"""Folders and files are there whole at every instant, whoever looks and whenever the process ends."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trimtab import snapshot

PUBLISHER = """
import sys
from pathlib import Path
from trimtab import snapshot

place, number = Path(sys.argv[1]), 0
while True:
    staging, number = snapshot.stage(place), number + 1
    for name in "abc":
        (staging / name).write_text(str(number))
    snapshot.seal(staging, {"number": number})
    snapshot.publish(staging, place)
"""


def publish(place: Path, number: int) -> None:
    staging = snapshot.stage(place)
    (staging / "first").write_text(str(number))
    (staging / "second").write_text(str(number))
    snapshot.publish(staging, place)


def exchanges(place: Path) -> bool:
    """Whether the file system here can let two folders change places."""
    one, other = place / "one", place / "other"
    one.mkdir()
    other.mkdir()
    try:
        return snapshot.exchange(one, other)
    finally:
        one.rmdir()
        other.rmdir()


def test_two_folders_change_places(tmp_path: Path) -> None:
    if not exchanges(tmp_path):
        pytest.skip("folders do not change places here")
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert snapshot.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one/other").exists()
    assert (tmp_path / "other/one").exists()
    with pytest.raises(FileNotFoundError):
        snapshot.exchange(tmp_path / "one", tmp_path / "missing")


def test_who_looks_sees_a_whole_folder_at_every_instant(tmp_path: Path) -> None:
    if not exchanges(tmp_path):
        pytest.skip("folders do not change places here")
    place, wrong, looks, done = tmp_path / "place", list[str](), 0, threading.Event()
    publish(place, 0)

    def look() -> None:
        nonlocal looks
        while not done.is_set():
            looks += 1
            try:
                held = os.open(place, os.O_RDONLY)
            except FileNotFoundError:
                wrong.append("nothing is there")
                continue
            files = set(os.listdir(held))
            if files != {"first", "second"} and os.path.samestat(os.stat(place), os.fstat(held)):  # one that lost its place may be emptied
                wrong.append("not whole")
            os.close(held)

    watcher = threading.Thread(target=look)
    watcher.start()
    for number in range(1, 120):
        publish(place, number)
    done.set()
    watcher.join()
    assert wrong == []
    assert looks > 120
    assert (place / "second").read_text() == "119"
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_process_killed_at_any_instant_leaves_a_whole_folder(tmp_path: Path) -> None:
    if not exchanges(tmp_path):
        pytest.skip("folders do not change places here")
    place = tmp_path / "place"
    for kill in range(4):
        process = subprocess.Popen([sys.executable, "-c", PUBLISHER, str(place)])
        time.sleep(0.7 + 0.0137 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert snapshot.damage(place) is None
        assert len({(place / name).read_text() for name in "abc"}) == 1


@pytest.mark.parametrize("ended", ["exchange", "rename", "rmtree"])
def test_whatever_step_fails_there_is_a_whole_folder(ended: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchanges(tmp_path):
        pytest.skip("folders do not change places here")
    place = tmp_path / "place"
    publish(place, 1)

    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "no more")

    with monkeypatch.context() as patch:
        owner = {"exchange": snapshot, "rename": os, "rmtree": shutil}[ended]
        patch.setattr(owner, ended, fails)
        with pytest.raises(OSError, match="no more"):
            publish(place, 2)
    assert {path.read_text() for path in place.iterdir()} == {"1" if ended == "exchange" else "2"}


@pytest.mark.parametrize("missing", ["the call", "the file system"])
def test_without_an_exchange_the_folder_is_replaced_by_two_renames(missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(snapshot, "_renameat2", None if missing == "the call" else refuses)
    for number in (1, 2):
        publish(tmp_path / "place", number)
    assert {path.read_text() for path in (tmp_path / "place").iterdir()} == {"2"}
    assert [path.name for path in tmp_path.iterdir()] == ["place"]


def test_a_link_at_the_place_is_replaced_and_what_it_names_is_kept(tmp_path: Path) -> None:
    publish(tmp_path / "target", 1)
    (tmp_path / "place").symlink_to("target", target_is_directory=True)
    publish(tmp_path / "place", 2)
    assert (tmp_path / "target/first").read_text() == "1"
    assert not (tmp_path / "place").is_symlink()
    assert (tmp_path / "place/first").read_text() == "2"


# files

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
