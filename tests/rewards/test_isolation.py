"""Only what fails is lost: single responses, by whatever they fail, in whatever the reward is made of."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny
from trimtab import rewards
from trimtab.config import load_recipe
from trimtab.data.templates import Template
from trimtab.errors import ConfigError, RewardError
from trimtab.rewards.function import FunctionReward
from trimtab.rewards.isolation import FailureLimit, Isolated, scored
from trimtab.rewards.length import LengthDebiased
from trimtab.rewards.segments import SegmentedReward, SegmentsConfig
from trimtab.types import Group, Prompt, Response, Score

WORDS = ["one", "three", "bad", "fifteen", "five"]
NEVER = threading.Event()


def group(texts: Sequence[str] = WORDS, **row: Any) -> Group:
    return Group(Prompt((1,), "p", row), tuple(Response((1,) * (len(text) + 1), text) for text in texts))


def spoilt(how: Callable[[], Any]) -> Callable[[str, str, Any], Any]:
    return lambda prompt, text, row: how() if text == "bad" else float(len(text))


def raises() -> float:
    raise ValueError("out of order")


def leaves() -> float:
    raise SystemExit(3)


def hangs() -> float:
    NEVER.wait(30)
    return 0.0


WAYS: dict[str, tuple[Callable[[], Any], str]] = {
    "raises": (raises, "raised ValueError: out of order"),
    "leaves": (leaves, "raised SystemExit: 3"),
    "nan": (lambda: math.nan, "returned nan"),
    "infinite": (lambda: math.inf, "returned inf"),
    "text": (lambda: "much", "returned 'much', which is not a number"),
    "nothing": (lambda: None, "returned None"),
    "hangs": (hangs, "no answer within 0.2 s"),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("way", WAYS)
def test_however_a_function_fails_only_that_response_has_no_score(way: str, workers: int) -> None:
    how, reason = WAYS[way]
    reward = Isolated(FunctionReward(spoilt(how), name="f"), together=False, workers=workers, timeout=0.2)
    (row,) = reward.score([group()])
    assert [score.missing for score in row] == [text == "bad" for text in WORDS]
    assert [score.total for score in row if not score.missing] == [float(len(text)) for text in WORDS if text != "bad"]
    assert reason in str(row[2].failure)
    assert all(score.failure is None for score in row if not score.missing)


@pytest.mark.parametrize("way", ["raises", "nan", "text", "hangs", "too few"])
def test_a_batched_function_loses_no_more(way: str) -> None:
    def lengths(prompts: list[str], texts: list[str], rows: list[Any]) -> list[Any]:
        found = [float(len(text)) if text != "bad" or way == "too few" else WAYS[way][0]() for text in texts]
        return found[:-1] if "bad" in texts and way == "too few" else found

    reward = Isolated(FunctionReward(lengths, batched=True, tolerant=True), together=True, timeout=0.1)
    rows = reward.score([group(WORDS[:2]), group(WORDS[2:])])
    assert [[score.missing for score in row] for row in rows] == [[False, False], [True, False, False]]
    assert [score.total for row in rows for score in row if not score.missing] == [3, 5, 7, 4]


def test_a_bad_number_in_a_batch_leaves_the_batchs_other_numbers_as_they_are() -> None:
    calls = []

    def ranks(prompts: list[str], texts: list[str], rows: list[Any]) -> list[float]:
        calls.append(len(texts))
        return [math.nan if text == "bad" else float(sorted(texts).index(text)) for text in texts]

    (row,) = Isolated(FunctionReward(ranks, batched=True, tolerant=True), together=True).score([group()])
    assert [score.total for score in row if not score.missing] == [3, 4, 1, 2]
    assert calls == [5]


def test_what_fails_now_and_then_is_tried_again_and_no_more_often_than_asked() -> None:
    for retries, missing in ((1, True), (2, False)):
        calls: list[str] = []

        def flaky(prompt: str, text: str, row: Any, calls: list[str] = calls) -> float:
            calls.append(text)
            return 1.0 if text != "bad" or calls.count(text) > 2 else raises()

        (row,) = Isolated(FunctionReward(flaky), together=False, retries=retries).score([group()])
        assert row[2].missing == missing
        assert calls.count("bad") == retries + 1
        assert len(calls) == len(WORDS) + retries


def test_a_value_stands_in_or_the_error_is_raised() -> None:
    function = FunctionReward(spoilt(raises), name="f")
    (row,) = Isolated(function, together=False, failed=-2.5).score([group()])
    assert row[2].total == row[2].parts["f"] == -2.5
    assert row[2].failure
    with pytest.raises(RewardError, match="out of order") as caught:
        Isolated(function, together=False, failed=None, retries=1).score([group()])
    assert "bad" in str(caught.value.where)


def test_too_many_failures_stop_with_the_commonest_reasons() -> None:
    def picky(prompt: str, text: str, row: Any) -> float:
        return raises() if len(text) == 5 else (math.nan if text == "bad" else 1.0)

    isolated = Isolated(FunctionReward(picky), together=False)
    answers = group(["three", "seven", "bad", "one", "two", "four", "six", "ten", "go", "a"])
    assert sum(score.missing for score in FailureLimit(isolated, 0.3).score([answers])[0]) == 3
    with pytest.raises(RewardError, match=r"3 of 10 responses.*max_failures=0.2.*2 x .*out of order.*1 x .*nan") as caught:
        FailureLimit(isolated, 0.2).score([answers])
    assert "three" in str(caught.value.where)


def make(tmp_path: Path, *settings: str, excludes: bool = True) -> rewards.Reward:
    file = tmp_path / "functions.py"
    file.write_text(
        "def picky(prompt, text, row):\n    if text == 'bad':\n        raise ValueError('no')\n    return float(len(text))\n"
        "def plain(prompt, text, row):\n    return 10.0\n"
    )
    words = [setting.replace("FILE", str(file)) for setting in ("max_failures=1", *settings)]
    return rewards.make(load_recipe(rewards.RewardConfig, None, words), excludes=excludes)


PICKY, PLAIN = "function: 'FILE:picky'", "function: 'FILE:plain'"


@pytest.mark.parametrize("how", ["sum", "mean", "min", "uncertainty"])
def test_a_combination_fails_where_a_member_does_and_takes_what_stands_in(tmp_path: Path, how: str) -> None:
    def bad(*settings: str) -> Score:
        (row,) = make(tmp_path, f"combine={how}", *settings).score([group()])
        assert [score.failure is None for score in row] == [text != "bad" for text in WORDS]
        return row[2]

    assert bad(f"members=[{{{PLAIN}}}, {{{PICKY}}}]", "on_failure=exclude").missing
    assert bad(f"members=[{{{PLAIN}}}, {{{PICKY}}}]", "on_failure=value", "failure_value=-7").total == -7
    assert bad(f"members=[{{{PLAIN}}}, {{{PICKY}, on_failure: exclude}}]").missing
    within = bad(f"members=[{{{PLAIN}}}, {{{PICKY}, on_failure: value, failure_value: 4}}]", "uncertainty_weight=0.5")
    assert within.total == {"sum": 14, "mean": 7, "min": 4, "uncertainty": 7 - 0.5 * 9}[how]


def test_a_combinations_retries_are_those_of_its_members(tmp_path: Path) -> None:
    for how in ("stop", "exclude"):
        made = make(tmp_path, f"members=[{{{PLAIN}}}, {{{PICKY}, retries: 1}}]", "retries=3", f"on_failure={how}")
        combined = made if how == "stop" else made.member  # type: ignore[attr-defined]
        assert [member.retries for member in combined.members] == [3, 1]  # type: ignore[attr-defined]


def test_a_model_or_rule_that_cannot_read_one_row_scores_the_others(tmp_path: Path) -> None:
    groups = [group(["yes"], answer="yes"), group(["yes"])]
    (good,), (bad,) = make(tmp_path, "verifier={kind: exact}", "on_failure=exclude").score(groups)
    assert good.total == 1
    assert "no column 'answer'" in str(bad.failure)
    with pytest.raises(RewardError, match="no column"):
        make(tmp_path, "verifier={kind: exact}").score(groups)


def test_the_line_in_length_is_that_of_what_was_scored(tmp_path: Path) -> None:
    reward = make(tmp_path, "function=FILE:picky", "length_debias=token", "on_failure=value", "failure_value=100")
    (row,) = reward.score([group()])
    assert row[2].total == 100
    alone = LengthDebiased(FunctionReward(lambda p, text, r: float(len(text))))
    (expected,) = alone.score([group([text for text in WORDS if text != "bad"])])
    assert [score.total for score in row if score.failure is None] == pytest.approx([score.total for score in expected])


def test_a_response_fails_with_one_of_its_pieces() -> None:
    template = Template.of(tiny.tokenizer())
    prompt = template.prompt("q:")
    answers = Group(prompt, tuple(template.response(prompt, text) for text in ("One. Two.", "One. bad. Two.")))
    function = FunctionReward(lambda p, text, row: raises() if text.strip() == "bad." else float(len(text)))
    reward = SegmentedReward(Isolated(function, together=False), template, SegmentsConfig(score="alone"), failed=-1)
    ((good, bad),) = reward.score([answers])
    assert (good.total, good.failure) == (9, None)
    assert (bad.total, bad.placed) == (-1, ())
    assert "out of order" in str(bad.failure)


def test_responses_without_a_score_leave_their_group_and_too_small_a_rest_leaves_too() -> None:
    def row(pattern: str) -> list[Score]:
        return [Score(float(i)) if mark == "x" else Score(math.nan, failure="why") for i, mark in enumerate(pattern)]

    def left(least: int) -> list[list[float]]:
        groups, scores, failures = scored([group("abc"[: len(pattern)]) for pattern in patterns], [row(p) for p in patterns], least)
        assert [len(g.responses) for g in groups] == [len(r) for r in scores]
        assert [r.text for g in groups for r in g.responses] == ["abc"[int(s.total)] for r in scores for s in r]
        assert (failures.count, len(failures.failed)) == (14, 7)
        assert failures.metrics() == {"reward/failures": 7.0, "reward/failed_fraction": 0.5}
        return [[score.total for score in row] for row in scores]

    patterns = ["xxx", ".xx", "..x", "...", ".x"]
    assert left(1) == [[0, 1, 2], [1, 2], [2], [1]]
    assert left(2) == [[0, 1, 2], [1, 2]]


def test_settings_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot leave responses out"):
        make(tmp_path, "function=FILE:picky", "on_failure=exclude", excludes=False)
    for wrong in ("model=x", "verifier={kind: exact}", f"members=[{{{PLAIN}}}]"):
        with pytest.raises(ConfigError, match="timeout is of function and url"):
            make(tmp_path, wrong, "timeout=1")
    with pytest.raises(ConfigError, match="max_failures"):
        make(tmp_path, "function=FILE:picky", "max_failures=1.5")


def test_without_the_settings_nothing_is_wrapped(tmp_path: Path) -> None:
    assert isinstance(make(tmp_path, "function=FILE:picky"), FunctionReward)
    assert isinstance(rewards.bare(make(tmp_path, "function=FILE:picky", "on_failure=value", "retries=2")), FunctionReward)
