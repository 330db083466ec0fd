"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a script: tests interrupt themselves and what they start
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("same every time", derandomize=True, database=None, deadline=None)  # seconds are not what is tested
settings.load_profile("same every time")
install_import_hook("trimtab.maths", "beartype.beartype")  # every shape and type the signatures state is checked


@pytest.fixture(autouse=True)
def own_reference_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what another one, or the user, has left behind."""
    from trimtab.models import reference_cache

    place = reference_cache.folder
    monkeypatch.setattr(reference_cache, "folder", lambda setting: tmp_path_factory.mktemp("c") if setting == "default" else place(setting))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the checkout. Tests that use it are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared folder beside the checkout")
    return folder


@pytest.fixture(params=["fastest", "avx512"])
def instructions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels as the processor runs them fastest, and, where that is with tiles, with vectors alone."""
    from trimtab import kernels

    if request.param == "fastest":
        yield
        return
    if not kernels.has_tiles():
        pytest.skip("no tile unit here: vectors are the fastest")
    kernels.library.cache_clear()
    with monkeypatch.context() as patch:
        patch.setenv("TRIMTAB_KERNELS", "avx512")
        yield
    kernels.library.cache_clear()
