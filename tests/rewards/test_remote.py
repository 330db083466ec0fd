"""Rewards over HTTP, from real servers that work, are down for a while, slow, or talk nonsense."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from servers import Answer, Server, lengths, serving
from trimtab import rewards
from trimtab.config import load_recipe, to_yaml
from trimtab.errors import ConfigError, RewardError
from trimtab.rewards import remote
from trimtab.rewards.remote import Circuit, RemoteReward, Unavailable
from trimtab.types import Group, Prompt, Response, Score

TEXTS = ["x" * n for n in range(11)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.02)
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.1)


def groups(texts: Sequence[str] = TEXTS) -> list[Group]:
    """Groups of three and what is left."""
    cut = [texts[i : i + 3] for i in range(0, len(texts), 3)]
    return [Group(Prompt((1,), f"p{i}", {"answer": i}), tuple(Response((1,), t) for t in part)) for i, part in enumerate(cut)]


def flat(rows: list[list[Score]]) -> list[Score]:
    return [score for row in rows for score in row]


@pytest.mark.parametrize(("workers", "per_request"), [(1, 1), (1, 4), (4, 1), (3, 4), (2, 100)])
def test_scores_come_back_in_order_whatever_the_concurrency(workers: int, per_request: int) -> None:
    def jumbled(asked: dict[str, Any]) -> Answer:
        time.sleep(0.002 * (11 - len(asked["samples"][0]["response"])))  # the first requests are answered last
        return lengths(asked)

    with serving(jumbled) as server:
        rows = RemoteReward(server.url, workers=workers, per_request=per_request).score(groups())
        assert [len(row) for row in rows] == [3, 3, 3, 2]
        assert [score.total for score in flat(rows)] == [float(len(text)) for text in TEXTS]
        assert len(server.asked) == -(-len(TEXTS) // per_request)


def test_the_protocol_is_as_documented() -> None:
    turns = ({"role": "user", "content": "hi"},)
    asked = [
        Group(Prompt((1,), turns, {"a": 1}), (Response((1,), "yes", truncated=True),)),
        Group(Prompt((1,), "p"), (Response((1,), ""),)),
    ]
    with serving() as server:
        RemoteReward(server.url + "/", token="secret").score(asked)
        [(headers, body)] = server.asked
    assert body == {
        "path": "/score",
        "samples": [
            {"prompt": [{"role": "user", "content": "hi"}], "response": "yes", "row": {"a": 1}, "truncated": True},
            {"prompt": "p", "response": "", "row": {}, "truncated": False},
        ],
    }
    assert (headers["Authorization"], headers["Content-Type"]) == ("Bearer secret", "application/json")


def later(port: int, seconds: float) -> tuple[threading.Thread, list[Server]]:
    """A server that comes up at a port after a while."""
    made: list[Server] = []
    thread = threading.Thread(target=lambda: (time.sleep(seconds), made.append(Server(lengths, port))))
    thread.start()
    return thread, made


@pytest.mark.parametrize("workers", [1, 4])
def test_a_server_that_is_down_and_comes_back_costs_nothing_but_time(workers: int) -> None:
    with serving() as server:
        port = server.port
    reward = RemoteReward(f"http://127.0.0.1:{port}", workers=workers, per_request=2, patience=20, break_after=3)
    thread, made = later(port, 0.6)
    began = time.monotonic()
    rows = reward.score(groups())
    assert 0.5 < time.monotonic() - began < 15
    assert [score.total for score in flat(rows)] == [float(len(text)) for text in TEXTS]
    thread.join()
    made[0].close()


def test_a_server_that_says_it_is_busy_is_waited_for() -> None:
    said = [503, 429, 502, 504, 408]
    with serving(lambda asked: (said.pop(), {}) if said else lengths(asked)) as server:
        rows = RemoteReward(server.url, per_request=4, patience=20, break_after=2).score(groups())
    assert not said
    assert [score.total for score in flat(rows)] == [float(len(text)) for text in TEXTS]


def test_patience_is_one_for_all_requests_and_the_next_call_begins_afresh() -> None:
    with serving() as server:
        port = server.port
    reward = RemoteReward(f"http://127.0.0.1:{port}", workers=2, per_request=1, patience=1, break_after=2)
    began = time.monotonic()
    rows = reward.score(groups())
    assert 0.8 < time.monotonic() - began < 5  # not once for each of the eleven, which two workers would take 5.5 for
    assert all("not to be reached" in str(score.failure) or "cannot be reached" in str(score.failure) for score in flat(rows))
    server = Server(lengths, port)
    assert not any(score.missing for score in flat(reward.score(groups())))
    server.close()


def test_while_the_circuit_is_broken_one_request_at_a_time_tries() -> None:
    circuit, at_once, most = Circuit(1, 20), 0, 0
    circuit.failed()
    lock = threading.Lock()

    def go(meet: threading.Barrier) -> None:
        nonlocal at_once, most
        with circuit.turn():
            with lock:
                at_once += 1
                most = max(most, at_once)
            meet.wait(30)
            time.sleep(0.02)
            with lock:
                at_once -= 1

    def together(parties: int) -> int:
        """The most that were in their turn at once, which end it no sooner than so many have met."""
        nonlocal most
        most, meet = 0, threading.Barrier(parties)
        threads = [threading.Thread(target=go, args=(meet,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return most

    assert together(1) == 1
    circuit.worked()
    assert together(4) == 4
    spent = Circuit(1, 0)
    spent.failed()
    with pytest.raises(Unavailable), spent.turn():
        pass


BROKEN: dict[str, tuple[Any, str]] = {
    "500": ((500, b"out of memory"), "500: out of memory"),
    "422": ((422, {"error": "too long"}), "422"),
    "garbage": ((200, b"<html>"), "not JSON"),
    "no list": ((200, {"score": 1}), "no list of scores"),
    "null": ((200, {"scores": [None]}), "could not score it"),
    "a reason": ((200, {"scores": [None], "reasons": ["it is empty"]}), "it is empty"),
    "nan": ((200, b'{"scores": [NaN]}'), "'nan', which is not a finite number"),
    "text": ((200, {"scores": ["1.0"]}), "'1.0', which is not a finite number"),
    "a bool": ((200, {"scores": [True]}), "not a finite number"),
}


@pytest.mark.parametrize("way", BROKEN)
def test_what_the_server_cannot_score_is_the_failure_of_that_sample_alone(way: str) -> None:
    answer, reason = BROKEN[way]

    def one_is_bad(asked: dict[str, Any]) -> Answer:
        if "bad" not in [sample["response"] for sample in asked["samples"]]:
            return lengths(asked)
        if answer[0] == 200 and isinstance(answer[1], dict) and "scores" in answer[1] and len(asked["samples"]) > 1:
            bad = [sample["response"] == "bad" for sample in asked["samples"]]
            return 200, {"scores": [answer[1]["scores"][0] if is_bad else 9.0 for is_bad in bad]}
        return answer

    with serving(one_is_bad) as server:
        rows = RemoteReward(server.url, per_request=3, patience=20).score(groups(["aa", "bad", "c", "dd"]))
    assert [score.missing for score in flat(rows)] == [False, True, False, False]
    if way != "a reason":
        assert reason in str(flat(rows)[1].failure)


def test_a_wrong_count_is_asked_for_again_one_by_one() -> None:
    def one_too_few(asked: dict[str, Any]) -> Answer:
        status, said = lengths(asked)
        return status, {"scores": said["scores"][:-1] if len(asked["samples"]) > 1 else said["scores"]}

    with serving(one_too_few) as server:
        rows = RemoteReward(server.url, per_request=4).score(groups())
    assert [score.total for score in flat(rows)] == [float(len(text)) for text in TEXTS]
    with serving(lambda _: (200, {"scores": [1.0, 2.0]})) as server:
        rows = RemoteReward(server.url, per_request=1).score(groups(["a"]))
    assert "2 scores for 1 sample" in str(flat(rows)[0].failure)


def test_refusals_are_repeated_as_often_as_asked() -> None:
    for retries, fails in ((1, True), (2, False)):
        said = [500, 500]
        with serving(lambda asked, said=said: (said.pop(), {}) if said else lengths(asked)) as server:
            [score] = flat(RemoteReward(server.url, retries=retries).score(groups(["abc"])))
            assert len(server.asked) == retries + 1
        assert score.missing == fails


def test_a_slow_sample_is_given_up_and_the_others_are_scored() -> None:
    def slow(asked: dict[str, Any]) -> Answer:
        if any(sample["response"] == "slow" for sample in asked["samples"]):
            time.sleep(0.5)
        return lengths(asked)

    with serving(slow) as server:
        reward = RemoteReward(server.url, per_request=2, timeout=0.1, patience=0.3)
        rows = reward.score(groups(["a", "bb", "slow", "dddd"]))
    assert [score.missing for score in flat(rows)] == [False, False, True, False]
    assert "did not answer within 0.1 s" in str(flat(rows)[2].failure)


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_wrong_address_or_token_stops_at_once_and_the_token_goes_nowhere_else(status: int) -> None:
    with serving(lambda _: (status, {})) as server:
        with pytest.raises(ConfigError, match=str(status)):
            RemoteReward(server.url, token="secret", patience=20).score(groups())
        assert {body["path"] for _, body in server.asked} == {"/score"}


def test_waits_grow_have_jitter_and_follow_from_the_seed() -> None:
    def delays(seed: int) -> list[float]:
        return [RemoteReward("http://h", seed=seed)._delay(0, attempt) for attempt in range(20)]

    assert delays(1) == delays(1) != delays(2)
    assert all(0.5 * 0.02 * 2**k <= wait <= 1.5 * 0.02 * 2**k for k, wait in enumerate(delays(3)[:2]))
    assert all(0.05 <= wait <= 0.15 for wait in delays(3)[4:])


def make(*settings: str, **options: Any) -> rewards.Reward:
    return rewards.make(load_recipe(rewards.RewardConfig, None, [*settings]), excludes=True, **options)


def test_a_recipe_decides_what_a_failure_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORES", "tell nobody")
    with serving(lambda asked: (500, b"you said Bearer tell nobody") if "bad" in str(asked) else lengths(asked)) as server:
        common = (f"url={server.url}", "token_env=SCORES", "per_request=1", "max_failures=1", "patience=1")
        with pytest.raises(RewardError, match=r"500: you said Bearer \[token\]"):
            make(*common).score(groups(["a", "bad"]))
        assert [score.missing for score in flat(make(*common, "on_failure=exclude").score(groups(["a", "bad"])))] == [False, True]
        assert [score.total for score in flat(make(*common, "on_failure=value").score(groups(["a", "bad"])))] == [1, 0]
        assert "tell nobody" not in to_yaml(load_recipe(rewards.RewardConfig, None, [*common]))


def test_an_address_is_checked_and_the_token_has_to_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SCORES", raising=False)
    with pytest.raises(ConfigError, match="SCORES is not set"):
        make("url=http://localhost:1", "token_env=SCORES")
    for wrong in ("ftp://h", "localhost:80", "http://user:pass@h", "https://h/?token=x"):
        with pytest.raises(ConfigError, match="url"):
            make(f"url='{wrong}'")
    with pytest.raises(ConfigError, match="token_env goes with url"):
        make("function=math:dist", "token_env=SCORES")
