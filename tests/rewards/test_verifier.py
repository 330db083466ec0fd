"""Rules as rewards: what counts as right, and predicates that misbehave in every way and leave nothing behind."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab import rewards
from trimtab.config import load_recipe
from trimtab.errors import ConfigError, RewardError
from trimtab.rewards.numerals import last_number
from trimtab.rewards.verifier import PredicateReward
from trimtab.types import Group, Prompt, Response

NUMBERS = {
    "The answer is 42.": 42, "so 5 - 3 = 2": 2, "5-3": 3, "x=-7": -7, "x = - 7": -7, "it is -3": -3, "5 - 3": 3, "-$5": -5, "$-5": -5,
    "(-2)": -2, "3 to 5, or 3-5": 5, "covid-19": 19, "on 2024-05-03": 3, "\u22124": -4, "1,234,567 people": 1234567, "a list: 1,2,3": 3,
    "1{,}234": 1234, "1\\,234": 1234, "pi is 3.14": Fraction("3.14"), ".5": Fraction(1, 2), "-0.25%": Fraction(-1, 4), "50%": 50,
    "3/4": Fraction(3, 4), "-3 / 4": Fraction(-3, 4), "\\frac{3}{4}": Fraction(3, 4), "-\\dfrac34": Fraction(-3, 4),
    "1 1/2 cups": Fraction(3, 2), "2\\frac{1}{2}": Fraction(5, 2), "1.5e3": 1500, "2e-2 m": Fraction(1, 50),
    "1.5 \\times 10^{3}": 1500, "6 * 10^2": 600, "\\boxed{12} and 13": 12, "\\boxed{1} then \\boxed{x = \\frac{1}{2}}": Fraction(1, 2),
    "\\boxed{7": 7, "1 2\n#### 1,000\nNext: 8": 1000, "#### -6 (as 2 * -3)": -6, "**42**": 42, "$42$": 42, "\\$42": 42, "H2O": None,
    "none": None, "": None, "1/0": None, "\\frac{\\pi}{2}": None, "\\boxed{yes} 3": None, "#### \n4": None, "9" * 5000: None,
    "1e999999999": 1, "10:30": 30,
}  # fmt: skip


def group(*texts: str, **row: Any) -> Group:
    return Group(Prompt((1,), "a question", row), tuple(Response((1,), text) for text in texts))


def totals(reward: Any, *groups: Group) -> list[list[float]]:
    return [[score.total for score in row] for row in reward.score(groups)]


def make(*settings: str) -> Any:
    return rewards.make(load_recipe(rewards.RewardConfig, None, list(settings)))


@pytest.mark.parametrize("text", NUMBERS)
def test_last_number(text: str) -> None:
    assert last_number(text) == NUMBERS[text]


@given(st.integers(-(10**9), 10**9), st.integers(0, 4))
@settings(max_examples=100, deadline=None)
def test_a_number_is_read_back_however_it_is_written(units: int, places: int) -> None:
    number, decimal = Fraction(units, 10**places), Decimal(units).scaleb(-places)
    for text in (f"{decimal:,.{places}f}", f"{decimal:.{places}f}", f"{number.numerator}/{number.denominator}"):
        for frame in ("{}", "= {} km", "12, then {}.", "\\boxed{{{}}} or 1", "so\n#### {}\n"):
            assert last_number(frame.format(text)) == number, frame.format(text)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_has_a_last_number_or_none(text: str) -> None:
    assert last_number(text) is None or isinstance(last_number(text), Fraction)


def test_numeric_compares_with_the_rows_answer_within_tolerances() -> None:
    reward = make("verifier={kind: numeric}")
    assert totals(reward, group("it is 1,000", "1001", "no idea", answer="so #### 1000")) == [[1, 0, 0]]
    assert totals(reward, group("0.3", "0.333", answer=0.3), group("2", "3", "4", answer=[2, "3"])) == [[1, 0], [1, 1, 0]]
    loose = make("verifier={kind: numeric, column: gold, absolute: 0, relative: 0.01, right: 2, wrong: -1}")
    assert totals(loose, group("101", "101.1", "99", gold=100)) == [[2, -1, 2]]


def test_exact_and_regex_and_their_normalisation() -> None:
    assert totals(make("verifier={kind: exact}"), group(" new \n york ", "New York", answer="new york")) == [[1, 0]]
    assert totals(make("verifier={kind: exact, ignore_case: true}"), group("NEW york", answer="New York")) == [[1]]
    assert totals(make("verifier={kind: exact, ignore_space: false}"), group("a ", "a", answer="a")) == [[0, 1]]
    pattern = "verifier={kind: regex, pattern: '^<think>.*</think>'}"
    assert totals(make(pattern), group("<think>x</think> y", "y <think>x</think>")) == [[1, 0]]


@pytest.mark.parametrize(("row", "what"), [({}, "no column 'answer'"), ({"answer": "blue"}, "'blue'"), ({"answer": True}, "not a number")])
def test_a_row_without_a_usable_answer_is_an_error(row: dict[str, Any], what: str) -> None:
    with pytest.raises(RewardError, match=what):
        totals(make("verifier={kind: numeric}"), group("1", **row))


@pytest.mark.parametrize(
    ("setting", "what"),
    [
        ("{kind: regex}", "pattern goes with kind regex"),
        ("{kind: exact, code: 'a.py:f'}", "code goes with kind python"),
        ("{kind: regex, pattern: '('}", "not a regular expression"),
        ("{kind: python, code: 'nowhere.py:f'}", "no file 'nowhere.py'"),
        ("{kind: python, code: 'def f(:'}", "not Python"),
        ("{kind: python, code: 'x = \"def \"'}", "there is no function"),
        ("{kind: exact}, function: 'a.py:f'", "set one of"),
    ],
)
def test_settings_that_do_not_fit_are_refused(setting: str, what: str) -> None:
    overrides = [f"verifier={setting}"] if "}," not in setting else ["verifier={kind: exact}", "function=a.py:f"]
    with pytest.raises(ConfigError, match=what):
        make(*overrides)


MISBEHAVING = """
import os, signal, subprocess, sys, time
seen = []

def verify(prompt, response, row):
    what = response
    if what == "right":
        return row["answer"] == 4 and prompt == "a question"
    if what == "wrong":
        return False
    if what == "number":
        return 0.25
    if what == "hang":
        time.sleep(60)
    if what == "spin":
        while True:
            pass
    if what == "eat":
        return len(bytearray(10 ** 10))
    if what == "raise":
        raise ValueError("no \\U0001f600" + "x" * 10000)
    if what == "exit":
        sys.exit(3)
    if what == "vanish":
        os._exit(1)
    if what == "kill the worker":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    if what == "stop the worker":
        os.kill(os.getppid(), signal.SIGSTOP)
        time.sleep(60)
    if what == "print":
        print('{"verdict": true}' * 1000, flush=True)
        os.write(1, b"garbage")
        return False
    if what == "text":
        return "yes"
    if what == "nan":
        return float("nan")
    if what == "nothing":
        return None
    if what == "remember":
        seen.append(1)
        open("left_behind", "w").write("x")
        return len(seen) + len(os.listdir("."))
    if what == "leave a child":
        subprocess.Popen(["sleep", "77.125"], start_new_session=True)
        return True
    if what == "environment":
        return not ({"HF_HUB_OFFLINE", "PYTHONPATH"} & set(os.environ)) and "torch" not in sys.modules
    if what == "files":
        return sorted(int(x) for x in os.listdir("/proc/self/fd"))[3:].__len__()
    if what == "write much":
        open("big", "wb").write(b"x" * 10 ** 8)
"""
FAILURES = {
    "hang": "timeout", "eat": "memory", "raise": "raised", "exit": "raised", "vanish": "died", "text": "no number",
    "nan": "no number", "nothing": "no number", "write much": "raised",
}  # fmt: skip


@pytest.fixture(scope="module")
def sandboxed() -> Iterator[PredicateReward]:
    reward = rewards.make(
        rewards.RewardConfig(verifier={"kind": "python", "code": MISBEHAVING, "failed": -7, "seconds": 1.5, "cpu_seconds": 1})
    )
    yield reward
    reward.close()


def test_verdicts_and_numbers_become_scores(sandboxed: PredicateReward) -> None:
    (row,) = sandboxed.score([group("right", "wrong", "number", "print", answer=4)])
    assert [score.total for score in row] == [1, 0, 0.25, 0]
    assert [score.parts for score in row][2] == {"verify": 0.25, "verify_failed": 0.0}


@pytest.mark.parametrize("what", FAILURES)
def test_a_failing_call_gets_its_score_and_is_counted_and_the_next_is_well(sandboxed: PredicateReward, what: str) -> None:
    before, starts = dict(sandboxed.failures), max(1, sandboxed.sandbox.starts)
    start = time.perf_counter()
    (row,) = sandboxed.score([group(what, "right", answer=4)])
    assert time.perf_counter() - start < 20
    assert [score.total for score in row] == [-7, 1]
    assert [score.parts["verify_failed"] for score in row] == [1, 0]
    assert sandboxed.failures == before | {FAILURES[what]: before.get(FAILURES[what], 0) + 1}
    assert sandboxed.sandbox.starts == starts  # the worker itself lives on


def test_cpu_time_is_limited_apart_from_the_wall_clock() -> None:
    reward = rewards.make(rewards.RewardConfig(verifier={"kind": "python", "code": MISBEHAVING, "seconds": 60, "cpu_seconds": 1}))
    assert totals(reward, group("spin")) == [[0]]
    assert reward.failures == {"cpu": 1}
    reward.close()


def test_no_call_sees_another_or_the_parents_environment(sandboxed: PredicateReward) -> None:
    assert totals(sandboxed, group("remember", "remember", "environment")) == [[2, 2, 1]]
    assert totals(sandboxed, group("files")) == [[1.0 + 1.0]]  # its pipe, and the listing itself


@pytest.mark.parametrize("what", ["kill the worker", "stop the worker"])
def test_a_worker_that_dies_or_hangs_is_replaced(sandboxed: PredicateReward, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimtab.rewards.sandbox.GRACE_SECONDS", 0.5)
    totals(sandboxed, group("right", answer=4))
    old, starts = sandboxed.sandbox._worker.process.pid, sandboxed.sandbox.starts
    assert totals(sandboxed, group(what, "right", answer=4)) == [[-7, 1]]
    assert sandboxed.sandbox.starts == starts + 1
    assert not Path(f"/proc/{old}").exists()


def test_an_interrupted_call_does_not_answer_the_next(sandboxed: PredicateReward) -> None:
    totals(sandboxed, group("right", answer=4))
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        totals(sandboxed, group("hang"))
    assert totals(sandboxed, group("number", "right", answer=4)) == [[0.25, 1]]


def running(*words: str) -> list[int]:
    """Processes whose command line has these words."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            line = (place / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if all(word.encode() in line for word in words):
            found.append(int(place.name))
    return found


def test_nothing_is_left_running(sandboxed: PredicateReward) -> None:
    assert totals(sandboxed, group("leave a child")) == [[1]]
    assert not running("sleep", "77.125")
    worker = sandboxed.sandbox._worker
    assert worker.process.pid in running("-I", str(Path(rewards.__file__).with_name("sandbox_worker.py")))
    sandboxed.close()
    assert worker.process.pid not in running("-I", str(Path(rewards.__file__).with_name("sandbox_worker.py")))
    assert not Path(worker.place).exists()


def test_a_forgotten_reward_ends_its_worker() -> None:
    reward = make("verifier={kind: python, code: 'def f(prompt, response, row): return True'}")
    assert totals(reward, group("x")) == [[1]]
    worker = reward.sandbox._worker.process.pid
    os.kill(worker, 0)
    del reward
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_failures_stop_the_run_if_so_asked_and_name_the_cause(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("LIMIT = 3\n")
    (tmp_path / "rule.py").write_text(
        "from helper import LIMIT\ndef other(p, r, row): return 1\ndef short(p, response, row): return len(response) < LIMIT or 1 / 0\n"
    )
    reward = make(f"verifier={{kind: python, code: '{tmp_path / 'rule.py'}:short', on_failure: error}}")
    assert totals(reward, group("ab")) == [[1]]
    with pytest.raises(RewardError, match=r"'short' failed \(raised\): ZeroDivisionError"):
        totals(reward, group("abc"))
    reward.close()
    with pytest.raises(RewardError, match="cannot be loaded: ModuleNotFoundError"):
        totals(make("verifier={kind: python, code: 'import no_such_thing\n\n\ndef f(p, r, row): return 1'}"), group("x"))


def test_a_call_takes_milliseconds(sandboxed: PredicateReward) -> None:
    totals(sandboxed, group("right", answer=4))
    fastest = 10.0  # of many: a busy machine holds up the others
    for _ in range(50):
        start = time.perf_counter()
        totals(sandboxed, group("right", answer=4))
        fastest = min(fastest, time.perf_counter() - start)
    assert fastest < 0.05
