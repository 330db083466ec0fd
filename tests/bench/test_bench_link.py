"""The parent and its workers: replies, failures and deaths, what a step is said to have held, and how the search chooses."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import pytest
from bench.compare import Bench, Missing, environment_of
from bench.link import Meter, Worker, WorkerError
from bench.works import TUNED_ALLOCATOR, WORKS, Setting

ECHO = """
import os, sys
from bench.link import serve

def die():
    sys.stderr.write("the last words")
    sys.stderr.flush()
    os._exit(3)

print("noise from a library")
serve({
    "twice": lambda x: {"value": 2 * x, "mmap": os.environ.get("MALLOC_MMAP_MAX_", "")},
    "fail": lambda: {}["nothing"],
    "die": die,
})
"""


@pytest.fixture
def echo(tmp_path: Path) -> Any:
    (tmp_path / "echo_worker.py").write_text(ECHO)
    with Worker("echo_worker", tmp_path / "log", path=[tmp_path], environment=TUNED_ALLOCATOR) as worker:
        yield worker


def test_a_worker_answers_and_its_libraries_may_print(echo: Worker) -> None:
    assert echo.ask("twice", x=21)["value"] == 42
    assert echo.ask("twice", x=1)["mmap"] == "0"


def test_a_failing_command_is_an_error_and_the_worker_goes_on(echo: Worker) -> None:
    with pytest.raises(WorkerError, match="KeyError"):
        echo.ask("fail")
    assert echo.ask("twice", x=1)["value"] == 2


def test_a_dead_worker_is_an_error_with_its_last_words(echo: Worker) -> None:
    with pytest.raises(WorkerError, match=r"status 3.*the last words"):
        echo.ask("die")


def test_a_step_reports_the_memory_it_held_and_not_that_of_earlier_ones() -> None:
    meter = Meter()
    meter.start()
    with mmap.mmap(-1, 80_000_000) as held:  # not from an allocator, which may keep it
        held.write(b"x" * 80_000_000)
        high = meter.stop()["peak_bytes"]
    meter.start()
    low = meter.stop()["peak_bytes"]
    assert high - low > 60_000_000


class Trials(Bench):
    """The search alone, on given times."""

    def __init__(self, seconds: dict[tuple[Any, ...], float | str]) -> None:
        super().__init__(lambda text: None)
        self.seconds, self.tried = seconds, []

    def prepare(self, work: Any, steps: int) -> Any:
        return Path("rows"), []

    def _trial(self, work: Any, rows: Path, setting: Setting, steps: int, give_up: float) -> dict[str, Any]:
        self.tried.append(tuple(setting.values()))
        answer = self.seconds[tuple(setting.values())]
        loss = 700.0 if answer == "wrong" else 10.0
        if isinstance(answer, str) and answer != "wrong":
            return {"refused": answer}
        return {"seconds": 0.1 if answer == "wrong" else answer, "first": {"loss": loss}}


def test_the_search_keeps_the_fastest_of_each_axis_and_refuses_other_work_and_failures() -> None:
    from dataclasses import replace

    work = replace(WORKS["sft"], start={"micro": 2, "layout": "padded"}, axes=(("micro", (1, 2, 4, 8)), ("layout", ("padded", "free"))))
    bench = Trials({(1, "padded"): 5.0, (2, "padded"): 4.0, (4, "padded"): 3.0, (8, "padded"): "out of memory", (4, "free"): "wrong"})
    found = bench.search(work)
    assert found["setting"] == {"micro": 4, "layout": "padded"}
    assert [trial["setting"]["micro"] for trial in found["trials"] if "refused" in trial] == [8, 4]
    assert len(bench.tried) == len(set(bench.tried)) == 5


def test_a_peer_that_is_not_installed_is_missing_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("bench.compare.TRL", tmp_path)
    monkeypatch.setattr("bench.compare.VLLM", tmp_path / "python")
    for name in ("dpo", "ppo", "decode-vllm"):
        with pytest.raises(Missing, match=WORKS[name].peer.split()[0]):
            environment_of(WORKS[name], WORKS[name].start)
