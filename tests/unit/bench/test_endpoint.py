"""How a server is asked before it is loaded, and what is refused then."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kervan.bench import benchmark, served_by, servers
from kervan.bench.endpoint import RequestError, get_text, stream_once
from kervan.bench.load import Endpoint, Load
from kervan.bench.served_by import ServedBy
from kervan.errors import ConfigError, FleetError

MODELS = {"data": [{"id": "tiny", "owned_by": "vllm", "max_model_len": 2048}, {"id": "lora", "parent": "tiny"}]}
PAGES: dict[str, Any] = {"/v1/models": MODELS, "/version": {"version": "0.24.0"}}
STREAM = (
    b'data: {"choices": [{"text": " a", "finish_reason": "length"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 16, "completion_tokens": 1}}\n\ndata: [DONE]\n\n'
)


class Handler(BaseHTTPRequestHandler):
    """Answers GET with `pages`, and POST with `status`, or a stream for the models that it has."""

    pages: dict[str, Any] = PAGES
    status = 200

    def answer(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(200, b"up 1\n", "text/plain")
        elif self.path in self.pages:
            self.answer(200, json.dumps(self.pages[self.path]).encode(), "application/json")
        else:
            self.answer(404, b"{}", "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.status != 200:
            self.answer(self.status, b"not this way", "text/plain")
        elif body["model"] in ("tiny", "lora", "unlisted"):
            self.answer(200, STREAM, "text/event-stream")
        else:
            self.answer(404, b"The model does not exist", "text/plain")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def handler() -> type[Handler]:
    return type("Own", (Handler,), {})


@pytest.fixture
def url(handler: type[Handler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def prepare(url: str, **given: Any) -> benchmark.Prepared:
    load = {name: given.pop(name) for name in ("isl", "osl", "prefixes", "prefix_tokens") if name in given}
    return benchmark.prepare(Endpoint(url=url, **given), Load(streams=1, duration_s=1, **load))


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
        with pytest.raises(RequestError, match=r"no HTTP \('SSH-2"):
            get_text(endpoint, "/metrics")
        exchange = stream_once(endpoint, {"prompt": "x"})
        assert "no HTTP" in exchange.message
        assert not servers.answers(endpoint.url)
        greeting.join()


def test_servers_are_asked_past_any_proxy_of_the_environment(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")  # nobody listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert get_text(Endpoint(url=url), "/metrics") == "up 1\n"
    assert servers.answers(url)


def test_a_server_that_takes_the_load(url: str) -> None:
    prepared = prepare(url)
    assert (prepared.endpoint.model, prepared.probe.answered, prepared.probe.complaint) == ("tiny", True, "")
    assert prepared.probe.served_by == ServedBy(product="vLLM", version="0.24.0")
    assert prepare(url, model="unlisted").probe.answered  # some servers have names that they do not list


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"model": "tinny"}, r"has no model 'tinny'; it has tiny, lora: use for example --model tiny"),
        ({"model": "tinny", "api": "chat"}, r"has no model 'tinny'; it has tiny, lora"),
        ({"isl": "2000"}, r"--isl 2000 and --osl 64 make 2064 tokens or more, and .*max_model_len is 2048"),
        ({"isl": "64", "prefixes": 2, "prefix_tokens": 1990}, r"--isl 64, --prefix 2x1990 and --osl 64 make 2118"),
    ],
)
def test_what_this_server_cannot_do(url: str, given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        prepare(url, **given)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "does not let this client in .*not this way.*--api-key KEY"),
        (403, "--api-key KEY"),
        (404, "has no POST /v1/completions for this .*not this way.*--api chat"),
        (307, "redirects POST /v1/completions .*give the URL that it points to"),
        (501, "gives no stream at /v1/completions .http_501: not this way"),
        (400, r"takes no token ids here \(not this way\) and has no /tokenize"),
    ],
)
def test_servers_at_which_nothing_can_succeed(url: str, handler: type[Handler], status: int, reason: str) -> None:
    handler.status = status
    with pytest.raises(ConfigError, match=reason):
        prepare(url)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_is_busy_is_still_loaded(url: str, handler: type[Handler], status: int) -> None:
    handler.status = status
    assert prepare(url).probe.complaint == f"http_{status}: not this way"


def test_where_nothing_listens() -> None:
    with socket.socket() as bound:  # and does not listen
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(FleetError, match="does not answer: connection refused; start the server, or check host"):
            prepare(f"http://127.0.0.1:{bound.getsockname()[1]}")


def test_a_server_without_tls(url: str) -> None:
    with pytest.raises(FleetError, match=r"it speaks no TLS there .*; use http:// in place of https://"):
        prepare(url.replace("http:", "https:"))


def test_what_speaks_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                link, _ = listener.accept()
                with link:
                    link.recv(65536)
                    link.sendall(b"-ERR unknown command\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(
            ConfigError, match=r"gives no stream .*garbage.*; give the URL of an OpenAI-compatible server"
        ):
            prepare(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


STATUS = {
    "gateway": "gw-1",
    "replicas": {"a": 0, "b": 1},
    "about": {"models": ["tiny"], "kervan": "1.0", "layout": "TP2", "gpu": "H200", "simulated": True},
}


def test_a_fleet_says_what_it_is(url: str, handler: type[Handler]) -> None:
    handler.pages = PAGES | {"/kervan/status": STATUS}
    known = prepare(url).probe.served_by
    assert str(known) == "kervan 1.0 (vLLM 0.24.0), 2 simulated replicas of TP2 on H200"
    assert known.to_dict() == {
        "product": "kervan", "version": "1.0", "engine": "vLLM 0.24.0", "gpu": "H200", "layout": "TP2", "replicas": 2,
        "simulated": True,
    }  # fmt: skip
    assert str(prepare(url, model="lora").probe.served_by) == "kervan 1.0 (vLLM 0.24.0)"  # a neighbour on the port


@pytest.mark.parametrize(
    ("headers", "owner", "version", "words"),
    [
        ({"server": "uvicorn"}, "", "", ""),
        ({"server": "nginx/1.25.3 (Ubuntu)"}, "", "", "nginx 1.25.3"),
        ({"server": "uvicorn"}, "sglang", "", "SGLang"),
        ({}, "someone", "0.5", "0.5"),
        ({}, "", "", ""),
    ],
)
def test_what_else_names_a_server(headers: dict[str, str], owner: str, version: str, words: str) -> None:
    assert str(served_by.from_headers(headers, owner, version)) == words


@pytest.mark.parametrize("about", [None, [], {}, {"models": None}, {"models": {"m": 1}}, {"models": ["other"]}])
def test_status_pages_of_other_versions(about: Any) -> None:
    status = {"gateway": "gw-1", "replicas": {"a": 0}, "about": about}
    assert served_by.from_status(status, "m", "0.24.0") == ServedBy(product="kervan", engine="vLLM 0.24.0")


@pytest.mark.parametrize("status", [None, [], {}, {"replicas": []}, {"replicas": {}}])
def test_pages_that_are_not_kervans(status: Any) -> None:
    assert served_by.from_status(status, "m", "") is None
