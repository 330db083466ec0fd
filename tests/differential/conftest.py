"""The three TRL versions, each started once; the largest difference every test has seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cases import LARGEST
from peer import Peer


def start(version: str, factory: pytest.TempPathFactory) -> Iterator[Peer]:
    peer = Peer(version, factory.mktemp(f"trl-{version}"))
    yield peer
    peer.close()


@pytest.fixture(scope="session")
def trl_1_16(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    yield from start("1.16.0", tmp_path_factory)


@pytest.fixture(scope="session")
def trl_1_12(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    yield from start("1.12.0", tmp_path_factory)


@pytest.fixture(scope="session")
def trl_0_11(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    yield from start("0.11.4", tmp_path_factory)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LARGEST:
        terminalreporter.section("largest difference from TRL")
    for test, difference in LARGEST.items():
        file, _, name = test.partition("::")
        area = file.removeprefix("test_trl_").removesuffix(".py").replace("_", " ")
        terminalreporter.write_line(f"{difference:8.1e}  {area}: {name.removeprefix('test_').replace('_', ' ')}")
