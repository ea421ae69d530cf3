"""What kervan doctor reads of a machine: this one, and files laid out as others have them."""

import http.server
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from kervan.doctor import gather


@contextmanager
def answering(status: int, body: bytes) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_versions_are_read_without_importing_what_they_are_of() -> None:
    found = gather.versions()
    assert (found.ray, found.torch) == (version("ray"), version("torch"))
    assert found.vllm and found.vllm_needs_torch.startswith("==")
    assert found.python_needs == {}


def test_a_fleet_that_is_ready_and_its_clock() -> None:
    with answering(200, b'{"status":"ready"}') as url:
        found = gather.ask_fleet("chat", url)
    assert (found.problem, found.name) == ("", "chat")
    assert found.clock_ahead_s is not None and abs(found.clock_ahead_s) < 3


def test_a_fleet_that_is_not_ready_says_why() -> None:
    with answering(503, b'{"status":"not ready","reason":"no replica is ready: a starting"}') as url:
        assert gather.ask_fleet("chat", url).problem == "no replica is ready: a starting"


def test_a_fleet_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # it is not asked
    with answering(200, b"") as url:
        pass
    assert gather.ask_fleet("chat", url).problem.startswith("no gateway answers (")


def test_who_has_a_port_is_named_and_a_free_one_has_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        number = server.getsockname()[1]
        taken = gather._port(number, is_fleets=True)
    assert f"(pid {os.getpid()})" in taken.holder and not taken.is_own
    assert gather._port(number, is_fleets=True).holder == ""


def test_gpus_are_counted_on_the_bus_and_their_sound_cards_are_not(tmp_path: Path) -> None:
    rows = {"0": ("0x10de", "0x030200"), "1": ("0x10de", "0x040300"), "2": ("0x8086", "0x030000")}
    for name, (vendor, kind) in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert gather.pci_gpus(tmp_path) == 1
    assert gather.pci_gpus(tmp_path / "none") == 0


def test_a_token_is_looked_at_and_never_shown(tmp_path: Path) -> None:
    home = {"HF_HOME": str(tmp_path)}
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    assert gather.hub_cache(home).token_source == ""
    assert gather.hub_cache(home).num_models == 1
    (tmp_path / "token").write_text("hf_secretsecret\n")
    (tmp_path / "token").chmod(0o644)
    found = gather.hub_cache(home)
    assert "chmod 600" in found.token_problem and "secretsecret" not in repr(found)
    (tmp_path / "token").chmod(0o600)
    assert gather.hub_cache(home).token_problem == ""
    assert "does not look like a token" in gather.hub_cache(home | {"HF_TOKEN": "secretsecret"}).token_problem


def test_a_proxy_is_named_without_its_password() -> None:
    assert gather._proxy({"HTTPS_PROXY": "http://me:pass@proxy:3128"}) == "HTTPS_PROXY=http://***@proxy:3128"
    assert gather._proxy({}) == ""


def test_a_directory_that_does_not_exist_yet_is_judged_by_what_is_there_of_its_way(tmp_path: Path) -> None:
    found = gather.folder("weights", tmp_path / "a" / "b")
    assert found.is_writable and 0 < found.free_bytes <= found.total_bytes


def test_this_machine_is_described_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERVAN_HOME", str(tmp_path))
    said: list[str] = []
    found = gather.machine("default", port=None, address="127.0.0.1:1", say=said.append)
    assert found.ray_problem.startswith("no Ray cluster answers at 127.0.0.1:1")
    assert found.ports[0].number == 8000
    assert found.memory_free_bytes <= found.memory_bytes
    assert len(found.folders) == 3 and said
