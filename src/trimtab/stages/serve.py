"""A reward as a server, for `reward.url` of other runs, on this machine or another."""

from __future__ import annotations

import hmac
import json
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import Field

from trimtab import rewards
from trimtab.config import Config
from trimtab.errors import ConfigError, TrimtabError
from trimtab.protocols import Reward
from trimtab.rewards import RewardConfig
from trimtab.types import Group, Prompt, Response

NO_TOKENS = (0,)
"""Stands for tokens of the policy, which do not travel: rewards that count them are refused."""


class ServeConfig(Config):
    """A recipe of `trimtab serve-reward`."""

    reward: RewardConfig = Field(default_factory=RewardConfig, description="what scores; a model, a function, a rule, or several")
    host: str = Field("127.0.0.1", description="the address to listen at; others than this machine's own reach it if it is 0.0.0.0")
    port: int = Field(8100, ge=0, le=65535, description="the port to listen at; 0: any that is free")
    token_env: str = Field(
        "TRIMTAB_REWARD_TOKEN", description="environment variable with the bearer token to ask for; where it is not set, one is made"
    )
    max_body_mb: int = Field(16, gt=0, description="the largest request that is read, in MiB")
    device: str = Field("auto", description="where a reward model is: auto, cpu, cuda, ...")


def named(word: str) -> list[str]:
    """The settings that the command's first word stands for: a folder is a reward model, file.py:name a function."""
    return [f"reward.{'function' if ':' in word else 'model'}={word}"]


def serve(config: ServeConfig) -> None:
    """Serve until interrupted."""
    reward, token = make_reward(config), os.environ.get(config.token_env)
    try:
        server = RewardServer(reward, token or secrets.token_urlsafe(24), config)
    except OSError as error:
        raise ConfigError(
            f"cannot listen at {config.host}:{config.port}: {error.strerror}", where="port", fix="set port=0, or another host"
        ) from None
    with server:
        print(f"reward {reward.name!r} at {server.url}", flush=True)
        if not token:
            print(f"token, for clients with reward.token_env={config.token_env}:\nexport {config.token_env}={server.token}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print("stopped")


def make_reward(config: ServeConfig) -> Reward:
    """The reward to serve: what it fails on gets no score, and the client decides what then."""
    if _counts_tokens(config.reward):
        raise ConfigError("the policy's tokens are not sent to the server", where="reward", fix="count length by character")
    settings = {"max_failures": 1.0} | ({"on_failure": "exclude"} if config.reward.on_failure == "stop" else {})
    return rewards.make(config.reward.model_copy(update=settings), device=config.device, excludes=True)


def _counts_tokens(config: RewardConfig) -> bool:
    own = config.length_debias == "token" or (config.length is not None and config.length.per == "token")
    return own or any(map(_counts_tokens, config.members or ()))


class RewardServer(ThreadingHTTPServer):
    """POST /score, as `rewards.remote` asks for it; one request at a time is scored."""

    daemon_threads = True

    def __init__(self, reward: Reward, token: str, config: ServeConfig) -> None:
        self.reward, self.token, self.largest = reward, token, config.max_body_mb << 20
        self.lock = threading.Lock()
        super().__init__((config.host, config.port), _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host!s}:{port}"

    def answer(self, body: bytes) -> dict[str, Any]:
        """The answer to a request's body. Raises BadRequest if it makes no sense."""
        groups = [_group(i, sample) for i, sample in enumerate(_samples(body))]
        with self.lock:
            scores = [row[0] for row in self.reward.score(groups)] if groups else []
        answer: dict[str, Any] = {"scores": [None if score.missing else score.total for score in scores]}
        return answer | ({"reasons": [score.failure for score in scores]} if any(score.failure for score in scores) else {})


class BadRequest(Exception):
    """A request that the client has to mend, in words."""


def _samples(body: bytes) -> Sequence[Any]:
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from None
    samples = asked.get("samples") if isinstance(asked, dict) else None
    if not isinstance(samples, list):
        raise BadRequest('the body is {"samples": [{"prompt": ..., "response": ..., "row": {...}}, ...]}')
    return samples


def _group(index: int, sample: Any) -> Group:
    """A sample as a prompt with one response."""
    if not isinstance(sample, Mapping):
        raise BadRequest(f"sample {index} is no object")
    prompt, response, row, truncated = (sample.get(name, missing) for name, missing in _FIELDS)
    if isinstance(prompt, list) and prompt and all(_is_turn(turn) for turn in prompt):
        prompt = tuple(prompt)
    elif not isinstance(prompt, str):
        raise BadRequest(f"sample {index}: prompt is a string, or a list of turns with role and content")
    if not isinstance(response, str):
        raise BadRequest(f"sample {index}: response is a string")
    if not isinstance(row, dict) or not isinstance(truncated, bool):
        raise BadRequest(f"sample {index}: row is an object, and truncated true or false")
    return Group(Prompt(NO_TOKENS, prompt, row), (Response(NO_TOKENS, response, truncated=truncated),))


_FIELDS: tuple[tuple[str, Any], ...] = (("prompt", None), ("response", None), ("row", {}), ("truncated", False))


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("role", "content"))


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60  # a client that sends nothing does not hold a thread for ever

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            return self._say(411, "the request needs a Content-Length")
        if int(length) > self.server.largest:
            self._discard(self.server.largest)
            return self._say(413, f"the body has {length} bytes, at most {self.server.largest} are read (max_body_mb)")
        if not self._may_ask():
            self._discard(int(length))
            return self._say(401, "send the server's token as Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        body = self.rfile.read(int(length))
        if self.path != "/score":
            return self._say(404, "ask by POST /score")
        try:
            self._send(200, self.server.answer(body))
        except BadRequest as error:
            self._say(400, str(error))
        except TrimtabError as error:
            self._say(500, error.what)
        except Exception as error:
            self._say(500, f"the reward raised {type(error).__name__}: {error}")

    def do_GET(self) -> None:
        self._say(*((405, "ask by POST /score") if self._may_ask() else (401, "send the server's token as Authorization: Bearer TOKEN")))

    def _may_ask(self) -> bool:
        given = self.headers.get("Authorization", "").encode("utf-8", "replace")
        return hmac.compare_digest(given, f"Bearer {self.server.token}".encode())

    def _discard(self, length: int) -> None:
        """Read what is not wanted: a client that is still sending would not hear the answer."""
        while length > 0 and (piece := self.rfile.read(min(length, 1 << 16))):
            length -= len(piece)

    def _say(self, status: int, what: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(status, {"error": what}, headers or {})

    def _send(self, status: int, answer: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing for every request."""
