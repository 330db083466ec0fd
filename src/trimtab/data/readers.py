"""Rows from files: JSONL, Parquet, saved and hub Hugging Face datasets. Every row knows its place, for messages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.errors import ConfigError, DataError

HUB = "hub:"
EXTRA = "pip install 'trimtab[data]'"
KINDS = f"a .jsonl or .parquet file, a folder saved by datasets, or {HUB}org/name:split"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a data source.

    place:  where it is, for messages: "file.jsonl:17" (a line), "file.parquet:17" (a row, from 1).
    values: its columns.
    """

    place: str
    values: Mapping[str, Any]


def read_rows(paths: str | Sequence[str]) -> Iterator[Row]:
    """The rows of one source, or of several one after the other.

    A source is a .jsonl or .parquet file, a folder written by `datasets.save_to_disk`, or a dataset of the Hugging Face
    hub: "hub:org/name", "hub:org/name:split" or "hub:org/name/configuration:split" (the split is "train" unless named).

    Raises DataError naming the file and line of what cannot be read, and for a source without rows; ConfigError if a
    package is missing.
    """
    for path in [paths] if isinstance(paths, str) else paths:
        empty = True
        for row in _reader(path):
            empty = False
            yield row
        if empty:
            raise DataError("there are no rows", where=path, fix="check that it was written completely")


def _reader(path: str) -> Iterator[Row]:
    if path.startswith(HUB):
        return _hub(path)
    if not Path(path).exists():
        raise DataError("there is no such file or folder", where=path, fix=f"check the path; data is {KINDS}")
    if Path(path).is_dir():
        return _saved(path)
    readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".parquet": _parquet}
    try:
        return readers[Path(path).suffix.lower()](path)
    except KeyError:
        raise DataError(f"unknown kind of file {Path(path).suffix!r}", where=path, fix=f"convert it: data is {KINDS}") from None


def _jsonl(path: str) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                values = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise DataError(
                    f"not valid UTF-8 ({error.reason} at byte {error.start + 1})", where=place, fix="save the file as UTF-8"
                ) from None
            except json.JSONDecodeError as error:
                what = f"not valid JSON: {error.msg} at column {error.colno}"
                raise DataError(what, where=place, fix="write one JSON object per line") from None
            if not text:
                continue
            if not isinstance(values, dict):
                raise DataError(f"the row is a {type(values).__name__}, not an object", where=place, fix="write one JSON object per line")
            yield Row(place, values)


def _parquet(path: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet files need pyarrow", where=path, fix=EXTRA) from None
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}:{number}", values)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file: {_first_line(error)}", where=path, fix="write the file again") from None


def _saved(path: str) -> Iterator[Row]:
    folder = Path(path)
    splits = folder / "dataset_dict.json"
    if splits.exists():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        fix = "name one of " + ", ".join(str(folder / name) for name in names)
        raise DataError(f"the folder holds several splits: {', '.join(names)}", where=path, fix=fix)
    if not (folder / "dataset_info.json").exists():
        raise DataError("the folder was not saved by datasets (no dataset_info.json)", where=path, fix=f"data is {KINDS}")
    with _datasets(path) as datasets:
        dataset = datasets.load_from_disk(path)
    return _rows(path, dataset)


def _hub(path: str) -> Iterator[Row]:
    name, _, split = path.removeprefix(HUB).partition(":")
    organisation, _, rest = name.partition("/")
    dataset, _, configuration = rest.partition("/")
    if not organisation or not dataset:
        raise DataError("this does not name a dataset of the hub", where=path, fix=f"write {HUB}org/name or {HUB}org/name:split")
    with _datasets(path) as datasets:
        loaded = datasets.load_dataset(f"{organisation}/{dataset}", configuration or None, split=split or "train")
    return _rows(path, loaded)


@contextlib.contextmanager
def _datasets(path: str) -> Iterator[Any]:
    """The `datasets` package; whatever it raises becomes a DataError."""
    try:
        import datasets
    except ImportError:
        raise ConfigError("Hugging Face datasets need the package datasets", where=path, fix=EXTRA) from None
    try:
        yield datasets
    except Exception as error:  # it raises its own, the hub's, the network's and arrow's errors
        fix = "check the name, the split, and that the machine can reach the hub or has the dataset in its cache"
        raise DataError(f"datasets cannot load it: {_first_line(error)}", where=path, fix=fix) from None


def _rows(path: str, dataset: Iterable[Mapping[str, Any]]) -> Iterator[Row]:
    for number, values in enumerate(dataset, 1):
        yield Row(f"{path}:{number}", values)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
