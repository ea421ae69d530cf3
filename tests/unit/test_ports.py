"""A port that is still free when a server asks for it."""

import socket
from pathlib import Path

import pytest

from kervan import ports


def test_a_free_port_is_none_that_the_kernel_gives_to_connections() -> None:
    first = int(ports.EPHEMERAL.read_text().split()[0])
    if first <= ports.FIRST:
        pytest.skip("the kernel takes ports from below 20,000 here")
    for _ in range(20):
        port = ports.free_port()
        assert ports.FIRST <= port < first
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_taken_port_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    only = ports.free_port()
    monkeypatch.setattr(ports, "FIRST", only)
    monkeypatch.setattr(ports, "EPHEMERAL", tmp_path / "range")
    ports.EPHEMERAL.write_text(f"{only + 1}\t60999\n")
    assert ports.free_port() == only
    with socket.create_server(("127.0.0.1", only)):
        assert ports.free_port() != only


@pytest.mark.parametrize("told", ["1024\t65535\n", None])
def test_where_the_kernel_has_all_ports_it_chooses(
    told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "EPHEMERAL", tmp_path / "range")
    if told is not None:
        ports.EPHEMERAL.write_text(told)
    assert 1024 <= ports.free_port() < 65536
