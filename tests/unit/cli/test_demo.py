"""What `kervan demo` says when something comes between; the demo itself is run by `make demo`."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from kervan.cli import demo
from kervan.errors import FleetError
from kervan.ports import free_port

MODELS = json.dumps({"data": [{"id": "tiny"}]}).encode()


@contextmanager
def server(status: int, page: bytes) -> Iterator[int]:
    """The port of a server that answers every request with `page`, and names a model."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(MODELS if self.path == "/v1/models" else page)

        def do_POST(self) -> None:
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield http.server_address[1]
        finally:
            http.shutdown()
            thread.join()


def answering(status: int, page: object) -> str:
    with server(status, page if isinstance(page, bytes) else json.dumps(page).encode()) as port:
        return demo._serving_replica("127.0.0.1", port)


def test_the_replica_that_answers_is_the_one_with_the_stream() -> None:
    assert answering(200, {"replicas": {"a": 0, "b": 1}}) == "b"


@pytest.mark.parametrize(
    ("status", "page", "why"),
    [
        (200, {"replicas": {"a": 0, "b": 0}}, r"no replica has the stream \(a, b\).*run the demo again"),
        (200, {"replicas": {}}, r"no replica has the stream \(there is none\)"),
        (200, b"<html>", "does not answer: Expecting value.*see `kervan status`"),
        (503, {"reason": "starting"}, "GET /kervan/status answered 503: .*starting"),
    ],
)
def test_a_gateway_that_cannot_tell(status: int, page: object, why: str) -> None:
    with pytest.raises(FleetError, match=why):
        answering(status, page)


@pytest.mark.parametrize(
    ("last", "why"),
    [
        ("", r"ended without \[DONE\]; see"),
        ('data: {"error": {"message": "no replica"}}', "ended with an error: .*no replica.*; see"),
    ],
)
def test_a_stream_that_breaks_off(last: str, why: str) -> None:
    piece = 'data: {"choices": [{"delta": {"content": "Hi"}}]}'
    with server(200, f"{piece}\n\n{last}\n\n".encode()) as port:
        pieces = demo._stream_chat("127.0.0.1", port, "Hello?")
        assert next(pieces) == "Hi"
        with pytest.raises(FleetError, match=why):
            next(pieces)


@pytest.mark.parametrize(
    "ask", [demo._serving_replica, lambda host, port: list(demo._stream_chat(host, port, "Hello?"))]
)
def test_a_gateway_that_is_gone(ask: Callable[[str, int], object]) -> None:
    port = free_port()
    with pytest.raises(FleetError, match=f"127.0.0.1:{port} does not answer: .*refused; see `kervan status`"):
        ask("127.0.0.1", port)


def test_a_replica_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        demo._kill("a", {"a": process.pid, "b": 1})
        assert process.wait(10) == -9
    with pytest.raises(FleetError, match=f"replica a, process {process.pid}, cannot be killed: No such process; run"):
        demo._kill("a", {"a": process.pid})
    with pytest.raises(FleetError, match=r"replica c is answering, and the initial replicas \(a, b\) are gone"):
        demo._kill("c", {"a": process.pid, "b": 1})


def test_a_command_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KERVAN_HOME", str(tmp_path))
    with pytest.raises(FleetError, match=r"`kervan status --name none --json` exited with 1; its message is above"):
        demo._json_of("status", "--name", "none")
    assert "no fleet 'none' was started from this machine" in capfd.readouterr().err
