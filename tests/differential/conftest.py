"""The three TRL versions, each started once, and float64 throughout."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
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
