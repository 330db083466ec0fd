"""The reward server, asked by real requests and by the client that runs use."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab.cli import main
from trimtab.config import load_recipe
from trimtab.data.templates import Template
from trimtab.errors import ConfigError
from trimtab.models.loading import ModelConfig
from trimtab.models.scorer import Scorer
from trimtab.rewards.model import ModelReward
from trimtab.rewards.remote import RemoteReward
from trimtab.stages.serve import RewardServer, ServeConfig, make_reward, named
from trimtab.types import Group

TEMPLATE = Template.of(tiny.tokenizer())
TOKEN = "a token"


def groups() -> list[Group]:
    prompts = [TEMPLATE.prompt(text) for text in ("say one", "say two")]
    return [Group(p, tuple(TEMPLATE.response(p, text, text == "cut") for text in ("yes", "cut", ""))) for p in prompts]


@contextmanager
def serving(*settings: str) -> Iterator[RewardServer]:
    config = load_recipe(ServeConfig, None, ["port=0", "max_body_mb=1", *settings])
    with RewardServer(make_reward(config), TOKEN, config) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def function(tmp_path: Path) -> str:
    (tmp_path / "count.py").write_text(
        "def letters(prompt, response, row):\n    if response == 'bad':\n        raise ValueError('never')\n"
        "    return len(prompt) + len(response) + row.get('more', 0)\n"
    )
    return f"{tmp_path / 'count.py'}:letters"


def ask(server: RewardServer, body: bytes, *, path: str = "/score", method: str = "POST", **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
    connection.request(method, path, body, {"Authorization": f"Bearer {TOKEN}", **headers})
    answer = connection.getresponse()
    said = json.loads(answer.read())
    connection.close()
    return answer.status, said


def samples(*given: Any) -> bytes:
    return json.dumps({"samples": given}).encode()


def test_a_model_scores_as_it_does_in_the_process(tmp_path: Path) -> None:
    scorer = Scorer.load(ModelConfig(path=str(tiny.folder(tmp_path / "base")), dtype="float32", device="cpu"), head="zero", template="auto")
    torch.manual_seed(0)
    torch.nn.init.normal_(scorer.head.weight)
    scorer.save(tmp_path / "rm")
    here = ModelReward.load(ModelConfig(path=str(tmp_path / "rm"), dtype="float32", device="cpu")).score(groups())
    with serving(*named(str(tmp_path / "rm")), "reward.dtype=float32", "device=cpu") as server:
        there = RemoteReward(server.url, token=TOKEN, workers=2, per_request=4).score(groups())
    expected = [[score.total for score in row] for row in here]
    assert len({total for row in expected for total in row}) == 6
    assert [[score.total for score in row] for row in there] == [pytest.approx(row, abs=1e-5) for row in expected]


def test_a_function_gets_prompt_response_and_row_and_its_failures_come_back_as_such(function: str) -> None:
    with serving(*named(function)) as server:
        turns = [{"role": "user", "content": "hi"}]
        given = (
            {"prompt": "ab", "response": "c"},
            {"prompt": turns, "response": "", "row": {"more": 5}},
            {"prompt": "", "response": "bad"},
        )
        status, said = ask(server, samples(*given))
        assert (status, said["scores"]) == (200, [3.0, float(len("user: hi") + 5), None])
        assert "ValueError: never" in said["reasons"][2]
        assert ask(server, samples()) == (200, {"scores": []})


def test_only_who_has_the_token_is_answered(function: str) -> None:
    with serving(*named(function)) as server:
        good = samples({"prompt": "ab", "response": "c"})
        for wrong in ("", "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x"):
            for method, path in (("POST", "/score"), ("POST", "/other"), ("GET", "/score")):
                status, said = ask(server, good, path=path, method=method, Authorization=wrong)
                assert status == 401
                assert "scores" not in said
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
        connection.request("POST", "/score", good)  # no such header at all
        assert connection.getresponse().status == 401
        connection.close()
        assert ask(server, good)[0] == 200


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\xfd", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "the body is"),
        (b'{"samples": {}}', "the body is"),
        (samples(1), "sample 0 is no object"),
        (samples({"prompt": "a", "response": "b"}, {"response": "b"}), "sample 1: prompt"),
        (samples({"prompt": [{"role": "user"}], "response": "b"}), "sample 0: prompt"),
        (samples({"prompt": "a", "response": None}), "sample 0: response"),
        (samples({"prompt": "a", "response": "b", "row": []}), "sample 0: row"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_why(function: str, body: bytes, what: str) -> None:
    with serving(*named(function)) as server:
        status, said = ask(server, body)
        assert status == 400
        assert what in said["error"]
        assert ask(server, samples({"prompt": "", "response": ""}))[0] == 200  # and the server lives on


def test_other_paths_methods_and_large_bodies_are_refused(function: str) -> None:
    with serving(*named(function)) as server:
        assert ask(server, samples(), path="/")[0] == 404
        assert ask(server, b"", method="GET")[0] == 405
        assert ask(server, b" " * ((1 << 20) + 1))[0] == 413
        assert ask(server, b" " * (1 << 20))[0] == 400  # the largest that is read
        connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)
        connection.putrequest("POST", "/score")
        connection.putheader("Authorization", f"Bearer {TOKEN}")
        connection.endheaders()
        assert connection.getresponse().status == 411
        connection.close()


def test_it_listens_on_this_machine_alone_and_refuses_what_it_cannot_count() -> None:
    assert ServeConfig().host == "127.0.0.1"
    for counted in ("reward.length={}", "reward.members=[{length: {per: token}}]"):
        with pytest.raises(ConfigError, match="tokens are not sent"):
            make_reward(load_recipe(ServeConfig, None, [counted]))


def test_the_command_prints_a_token_it_made_and_not_one_it_was_given(function: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve-reward", "nowhere.py:f"]) == 2
    assert "there is no file" in capsys.readouterr().err
    for given in (None, "given before"):
        environment = {k: v for k, v in os.environ.items() if k != "SECRET"} | ({"SECRET": given} if given else {})
        command = [sys.executable, "-m", "trimtab", "serve-reward", function, "port=0", "token_env=SECRET"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            address = process.stdout.readline().split()[-1]
            token = given
            if token is None:
                process.stdout.readline()
                token = process.stdout.readline().strip().removeprefix("export SECRET=")
                assert len(token) >= 32
            ((score, *_), _) = RemoteReward(address, token=token).score(groups())
            process.send_signal(signal.SIGINT)
            rest = process.stdout.read()
        assert score.total == len("say one") + len("yes")
        assert process.returncode == 0
        assert given is None or given not in rest
