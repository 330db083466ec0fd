"""Rows and their places, and what is said of files that cannot be read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from trimtab.data.readers import read_rows
from trimtab.data.records import write_jsonl
from trimtab.errors import ConfigError, DataError

ROWS = [{"prompt": "a\u2028b", "n": 1}, {"prompt": "é", "n": None}, {"prompt": [{"role": "user", "content": "x"}], "n": 2}]


def test_jsonl_rows_know_their_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\n   \n{"prompt": "b"}')
    rows = list(read_rows(str(path)))
    assert [(row.place, row.values) for row in rows] == [(f"{path}:1", {"prompt": "a"}), (f"{path}:4", {"prompt": "b"})]


def test_written_rows_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    write_jsonl(path, ROWS)
    assert [row.values for row in read_rows(str(path))] == ROWS


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, ROWS)
    with pytest.raises(DataError, match=r"a\.jsonl:2: the row cannot be written"):
        write_jsonl(path, [{"a": 1}, {"a": {1}}])
    assert [row.values for row in read_rows(str(path))] == ROWS
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"bad.jsonl:2: not valid JSON: .*\n  fix: write one JSON object per line"),
        (b'{"a": 1}\n\n[1]\n', r"bad.jsonl:3: the row is a list, not an object"),
        (b'{"a": 1}\nnull\n', r"bad.jsonl:2: the row is a NoneType"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r"bad.jsonl:2: not valid UTF-8 \(invalid start byte at byte 8\)"),
        (b"", r"bad.jsonl: there are no rows"),
        (b"\n\n", r"bad.jsonl: there are no rows"),
    ],
)
def test_bad_jsonl_is_named_by_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(str(path)))


def test_several_files_follow_one_another(rows: Callable[..., str]) -> None:
    paths = [rows({"n": 1}, {"n": 2}, name="a.jsonl"), rows({"n": 3}, name="b.jsonl")]
    assert [row.values["n"] for row in read_rows(paths)] == [1, 2, 3]
    assert [row.values["n"] for row in read_rows(paths[::-1])] == [3, 1, 2]


def test_parquet_holds_the_same_rows(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = [{"prompt": [{"role": "user", "content": "x"}], "n": 1}, {"prompt": None, "n": 2}]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(table), path)
    assert [(row.place, row.values) for row in read_rows(str(path))] == [(f"{path}:1", table[0]), (f"{path}:2", table[1])]
    path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match="not a readable Parquet file"):
        list(read_rows(str(path)))


def test_saved_datasets_hold_the_same_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = [{"prompt": "a", "n": 1}, {"prompt": "b", "n": 2}]
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(table), "test": datasets.Dataset.from_list(table[:1])})
    splits.save_to_disk(tmp_path / "saved")
    assert [row.values for row in read_rows(str(tmp_path / "saved" / "train"))] == table
    with pytest.raises(DataError, match=rf"several splits: train, test\n  fix: name one of {tmp_path}/saved/train"):
        list(read_rows(str(tmp_path / "saved")))
    with pytest.raises(DataError, match="not saved by datasets"):
        list(read_rows(str(tmp_path)))


def test_hub_names_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[Any, ...]] = []

    def load(name: str, configuration: str | None, *, split: str) -> list[dict[str, int]]:
        calls.append((name, configuration, split))
        return [{"n": 1}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = list(read_rows(["hub:org/name", "hub:org/name:test", "hub:org/name/main:test[:5]"]))
    assert calls == [("org/name", None, "train"), ("org/name", None, "test"), ("org/name", "main", "test[:5]")]
    assert rows[0].place == "hub:org/name:1"
    with pytest.raises(DataError, match="does not name a dataset"):
        list(read_rows("hub:name"))


def test_what_datasets_raises_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match=r"hub:org/name: datasets cannot load it: no network\n  fix: "):
        list(read_rows("hub:org/name"))


@pytest.mark.parametrize(("module", "path"), [("pyarrow", "a.parquet"), ("datasets", "hub:org/name")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'trimtab[data]'")):
        list(read_rows(path))


def test_unknown_and_absent_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").touch()
    with pytest.raises(DataError, match=r"unknown kind of file '\.csv'"):
        list(read_rows(str(tmp_path / "a.csv")))
    with pytest.raises(DataError, match="no such file"):
        list(read_rows(str(tmp_path / "b.jsonl")))
