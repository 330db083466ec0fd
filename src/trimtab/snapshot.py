"""Folders and files that are there whole or not at all, and folders that can be seen to be whole.

A folder is filled beside its place, synced to the disk and renamed; a manifest in it names every file with its size and SHA-256.
A folder that is there already changes places with the new one in one step (Linux), and is removed afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from trimtab.errors import RunError

MANIFEST = "manifest.json"
WRITING = (OSError, SafetensorError)
"""What a write raises that fails: safetensors has an error of its own."""
STEP = re.compile(r"step-(\d{6,})")
LEFT = re.compile(r"\.step-\d{6,}-.+")
HERE, EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of renameat2(2)."""
CANNOT = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a kernel or file system answers that does not exchange."""


def save_atomically(folder: Path, write: Callable[[Path], object]) -> Path:
    """Fill a folder beside its final place, then rename: it is there whole or not at all."""
    staging = stage(folder)
    try:
        write(staging)
        publish(staging, folder)
    except WRITING as error:
        raise RunError(f"cannot save: {reason(error)}", where=str(folder), fix="free space or choose another output folder") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


@contextmanager
def new_file(path: Path, errors: str = "strict") -> Iterator[IO[str]]:
    """A text file that is there whole or not at all: written beside its place, synced, and renamed when nothing was raised.

    errors: what is done about text that has no UTF-8, as in `open`. What processes that were killed have left of the same file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
        writer = left.name.removeprefix(f".{path.name}.")
        if writer.isdecimal() and not running(int(writer)):
            left.unlink(missing_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with staging.open("w", encoding="utf-8", errors=errors) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def running(process: int) -> bool:
    """Whether a process of this number is there."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def stage(folder: Path) -> Path:
    """An empty folder beside a place, to be filled and published. Raises RunError where nothing can be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise RunError(f"cannot save: {reason(error)}", where=str(folder), fix="free space or choose another output folder") from error


def reason(error: BaseException) -> str:
    """Why something could not be written, in the system's words."""
    return getattr(error, "strerror", None) or str(error)


def publish(staging: Path, folder: Path) -> None:
    """Sync a filled folder and put it in its place; one that is there already is replaced."""
    for path in (*staging.rglob("*"), staging):
        _sync(path)
    staging.chmod(0o755)
    if folder.exists():
        retired = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        if exchange(staging, folder):
            os.rename(staging, retired / folder.name)
        else:  # for an instant there is nothing at the place; what was there lies beside it
            os.rename(folder, retired / folder.name)
            os.rename(staging, folder)
        _sync(folder.parent)
        shutil.rmtree(retired)
    else:
        os.rename(staging, folder)
        _sync(folder.parent)


def exchange(one: Path, other: Path) -> bool:
    """Let two things change places, in one step; False (and nothing has happened) where the system or the file system has no such step."""
    if _renameat2 is None:
        return False
    if _renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))


def remove(folder: Path) -> None:
    """Remove a folder that was published. It loses its name first: what an end in the middle leaves is no folder with less in it."""
    nameless = folder.with_name(f".{folder.name}-{time.time_ns()}")
    os.rename(folder, nameless)
    shutil.rmtree(nameless)


def sweep(checkpoints: Path) -> None:
    """Remove what a process has left that was ended while it wrote or removed a checkpoint. No other may be at work there."""
    for path in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if LEFT.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest: facts, and every file's size and checksum."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": _checksum(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")


def facts(folder: Path) -> dict[str, Any]:
    """What the manifest says. Raises ValueError or OSError if it cannot be read."""
    read = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not isinstance(read, dict) or not isinstance(read.get("files"), dict):
        raise ValueError("the manifest holds no list of files")
    return read


def damage(folder: Path) -> str | None:
    """What is wrong with a sealed folder, in words; None if it is whole."""
    try:
        files = facts(folder)["files"]
        for name, said in files.items():
            path = folder / name
            if not path.resolve().is_relative_to(folder.resolve()):
                return f"{MANIFEST} names {name}, outside the folder"
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != said["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {said['bytes']}"
            if _checksum(path) != said["sha256"]:
                return f"{name} is not what was written (its checksum differs)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:06d}"


def steps(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints of a run by the number of steps taken, newest first."""
    found = {}
    if checkpoints.is_dir():
        for path in checkpoints.iterdir():
            match = STEP.fullmatch(path.name)
            if match and path.is_dir() and not path.is_symlink():
                found[int(match[1])] = path
    return dict(sorted(found.items(), reverse=True))


def last_good(checkpoints: Path) -> tuple[int | None, dict[Path, str]]:
    """The newest whole checkpoint's step, and what is wrong with those after it."""
    wrong: dict[Path, str] = {}
    for step, path in steps(checkpoints).items():
        fault = damage(path)
        if fault is None:
            return step, wrong
        wrong[path] = fault
    return None, wrong


def _system_call() -> Callable[..., int] | None:
    """renameat2 of the C library, where it has one."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an older library
        return None
    call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return call  # type: ignore[no-any-return]


_renameat2 = _system_call()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
