"""How a server is asked before it is loaded."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from kervan.bench import servers
from kervan.bench.endpoint import RequestError, get_text, stream_once
from kervan.bench.load import Endpoint


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"up 1\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_of_another_protocol_is_said_to_be_one() -> None:
    def greet() -> None:
        for _ in range(2 + len(servers_asked)):
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
                connection.recv(1000)

    servers_asked = ("/v1/models", "/health")
    with socket.create_server(("127.0.0.1", 0)) as listening:
        greeting = threading.Thread(target=greet)
        greeting.start()
        endpoint = Endpoint(url=f"http://127.0.0.1:{listening.getsockname()[1]}")
        with pytest.raises(RequestError, match=r"not HTTP \('SSH-2"):
            get_text(endpoint, "/metrics")
        exchange = stream_once(endpoint, {"prompt": "x"})
        assert "not HTTP" in exchange.message
        assert not servers.answers(endpoint.url)
        greeting.join()


def test_servers_are_asked_past_any_proxy_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert get_text(Endpoint(url=url), "/metrics") == "up 1\n"
    assert servers.answers(url)
