"""A real reward server in a thread, whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, Any]
"""Status, and what is sent: bytes as they are, anything else as JSON."""


def lengths(asked: dict[str, Any]) -> Answer:
    """A server that works: the length of every response."""
    return 200, {"scores": [float(len(sample["response"])) for sample in asked["samples"]]}


class Server:
    """What was asked, by headers and body, and the address."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer], port: int = 0) -> None:
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append((dict(self.headers), {"path": self.path, **asked}))
                status, said = answer(asked)
                text = said if isinstance(said, bytes) else json.dumps(said).encode()
                with suppress(OSError):  # the client may have gone
                    self.send_response(status)
                    if status in (301, 302, 307):
                        self.send_header("Location", f"http://127.0.0.1:{outer.port}/elsewhere")
                    self.send_header("Content-Length", str(len(text)))
                    self.end_headers()
                    self.wfile.write(text)

            def log_message(self, *_: Any) -> None: ...

        ThreadingHTTPServer.allow_reuse_address = True
        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port: int = self.http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer] = lengths) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.close()
