"""What the commands say when the fleet's directory, or Ray, stops answering: one line, and exit status 1."""

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest
import ray
from ray.exceptions import ActorUnavailableError, AuthenticationError, GetTimeoutError, RayActorError, RpcError

from kervan import cli
from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import GatewayEntry, ReplicaEntry, Snapshot, as_told
from kervan.serve import app, changes, cluster, placement, ray_errors, ray_internals

CONFIG = FleetConfig(model="org/model", replicas=2, gateways=1)
READY = [ReplicaEntry(name, "on-demand", "10.0.0.1", 7, "ready") for name in ("a", "b")]
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # an empty frame of HTTP/2, with which gRPC greets
Answer = Callable[..., Any]


class Method:
    def __init__(self, name: str):
        self.name = name

    def remote(self, *_: Any) -> str:
        return self.name


class Actor:
    """A handle of a directory actor: what its methods return stands for the answer under way."""

    def __getattr__(self, name: str) -> Method:
        return Method(name)


def fail(error: BaseException) -> Answer:
    def answer(*_: Any, **__: Any) -> Any:
        raise error

    return answer


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Answer]]:
    """What the directory answers, by its methods; to be changed."""
    found: dict[str, Answer] = {
        "fleet": lambda: (CONFIG.to_json(), "secret", ""),
        "snapshot": lambda: msgspec.msgpack.encode(Snapshot(1, READY, [], [])),
        "order": lambda: True,
    }

    def get(asked: str, *, timeout: float | None = None) -> Any:
        return found[asked]()

    monkeypatch.setattr(cluster, "connect", lambda _: None)
    monkeypatch.setattr(ray, "get_actor", lambda *_, **__: Actor())
    monkeypatch.setattr(ray, "get", get)
    yield found


@pytest.mark.parametrize(
    "error",
    [GetTimeoutError("so long"), ActorUnavailableError("away", None), RayActorError(), ConnectionError("GCS is gone")],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("command", "method"),
    [("status", "fleet"), ("status", "snapshot"), ("drain a", "order"), ("drain a", "snapshot"), ("scale 3", "fleet")],
)
def test_one_line_says_that_the_directory_is_away(
    answers: dict[str, Answer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    method: str,
    error: BaseException,
) -> None:
    answers[method] = fail(error)
    monkeypatch.setattr(sys, "argv", ["kervan", *command.split(), "--address", "10.0.0.1:6379"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "directory" in line
    assert "try again" in line


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["kervan", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1


class Serving:
    """What Serve says of the fleet; its gateway answers HTTP."""

    def __init__(self, fleet: str):
        told = {
            "gateway": "gw-1", "fleet": fleet, "streams": 3, "held": 1, "directory_heard_s": 12.0,
            "directory": as_told(Snapshot(1, READY, [GatewayEntry("gw-1", "10.0.0.1", 8, "", "", True)], [])),
        }  # fmt: skip

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps(told).encode())

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))


@pytest.fixture
def serving(
    answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[None]:
    found = Serving(getattr(request, "param", "default"))
    monkeypatch.setenv("KERVAN_HOME", str(tmp_path))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray_internals, "kv_get", lambda _: CONFIG.to_json().encode())
    monkeypatch.setattr(app, "served", lambda *_: [app.ServedDeployment("on-demand", "HEALTHY", "", {"RUNNING": 2})])
    url = f"http://127.0.0.1:{found.server.server_port}"
    cluster.remember(cluster.Remembered("default", "10.0.0.1:6379", url))
    found.thread.start()
    yield
    found.server.shutdown()
    found.thread.join()
    found.server.server_close()


@pytest.mark.parametrize("command", ["status", "status --why", "top --once"])
@pytest.mark.usefixtures("serving")
def test_what_serve_and_a_gateway_know_is_shown_without_the_directory(
    answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    answers["snapshot"] = fail(GetTimeoutError("so long"))
    run(monkeypatch, *command.split())
    out, err = capsys.readouterr()
    assert "Serve: on-demand HEALTHY, 2 RUNNING" in out
    assert "gateway gw-1 heard this 12 s ago; it has 3 streams, 1 held" in out
    assert [line.split()[0] for line in out.splitlines() if line.startswith(("a ", "b ", "gw-1 "))] == [
        "a",
        "b",
        "gw-1",
    ]
    assert "does not answer (TimeoutError: no answer for 10 s)" in err
    run(monkeypatch, *command.split(), "--json")
    told = json.loads(capsys.readouterr().out)
    assert (told["complete"], told["model"], told["told_by"], told["told_s_ago"]) == (False, "org/model", "gw-1", 12.0)
    assert [replica["state"] for replica in told["replicas"]] == ["ready", "ready"]
    assert told["serve"]["on-demand"]["replicas"] == {"RUNNING": 2}


@pytest.mark.parametrize("serving", ["another"], indirect=True)
@pytest.mark.usefixtures("serving")
def test_what_another_fleets_gateway_says_is_not_taken_for_this_ones(
    answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers["fleet"] = fail(GetTimeoutError("so long"))
    run(monkeypatch, "status")
    out = capsys.readouterr().out
    assert "is a gateway of fleet 'another'" in out
    assert "gw-1" not in out


@pytest.mark.usefixtures("serving")
def test_nothing_is_shown_of_a_fleet_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "get_actor", fail(ValueError("no such actor")))
    monkeypatch.setattr(ray.util, "list_named_actors", lambda **_: [])
    monkeypatch.setattr(app, "served", lambda *_: None)
    run(monkeypatch, "status", "--name", "nobody")
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)


def test_serve_that_hangs_ends_a_change_before_it_begins(
    answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    node = placement.NodeDevices("10.0.0.1", 8, 8.0, None, "CPU")
    monkeypatch.setattr(changes, "validate", lambda config, **_: config)
    monkeypatch.setattr(cluster, "is_one_machine", lambda: True)
    monkeypatch.setattr(cluster, "devices_by_node", lambda *_: [node])
    monkeypatch.setattr(ray_internals, "serve_proxies", fail(RayActorError()))
    answers["set_config"] = fail(AssertionError("nothing may be changed"))
    run(monkeypatch, "scale", "3", "--address", "10.0.0.1:6379")
    assert "Serve's controller does not answer" in capsys.readouterr().err


def test_a_call_that_never_returns_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_errors._Abandoned, "is_any", False)
    forever = threading.Event()
    with pytest.raises(FleetError, match=r"Ray did not say it \(TimeoutError: no answer for 0 s\)"):
        ray_errors.bounded("Ray did not say it", forever.wait, 0.01)
    assert ray_errors.is_any_abandoned()
    forever.set()


def test_trying_again_is_no_fix_for_a_refused_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(FleetError) as failure:
        ray_errors.bounded("Ray did not say it", fail(AuthenticationError("InvalidAuthToken")))
    told = str(failure.value)
    assert told.startswith(
        "Ray did not say it: the token in RAY_AUTH_TOKEN is not that of the Ray cluster; set RAY_AUTH_TOKEN"
    )
    assert "try again" not in told


@pytest.mark.parametrize(
    ("greeting", "told"),
    [(b"", "does not answer"), (b"HTTP/1.1 400 Bad Request\r\n", "not the head of a Ray cluster"), (SETTINGS, "")],
)
def test_what_answers_at_an_address_is_looked_at_before_ray_is_asked(
    monkeypatch: pytest.MonkeyPatch, greeting: bytes, told: str
) -> None:
    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"127.0.0.1:{listening.getsockname()[1]}"

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(greeting)
                with contextlib.suppress(ConnectionResetError):
                    while connection.recv(1000):  # until the other side has enough
                        pass

        greeting_thread = threading.Thread(target=greet)
        greeting_thread.start()
        if told:
            with pytest.raises(FleetError, match=told):
                cluster.check_address(address)
        else:
            cluster.check_address(address)
        greeting_thread.join()


def test_only_who_would_start_ray_is_told_to_leave_the_address_out_for_it() -> None:
    with pytest.raises(FleetError, match="leave it out for a fleet started from this machine"):
        cluster.check_address("127.0.0.1:1")
    with pytest.raises(FleetError, match="leave it out to start Ray on this machine"):
        cluster.check_address("127.0.0.1:1", or_start=True)


@pytest.mark.parametrize("command", ["status --why", "drain 10.0.0.1"])
def test_one_line_says_that_ray_is_away(
    answers: dict[str, Answer], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(ray, "nodes", fail(RpcError("GCS is gone")))
    monkeypatch.setattr(ray_internals, "free_resources", fail(RpcError("GCS is gone")))
    monkeypatch.setattr(sys, "argv", ["kervan", *command.split(), "--address", "10.0.0.1:6379"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "error: Ray did not list the nodes of the cluster (RpcError: GCS is gone); try again in a few seconds\n"
    )
