"""A port that is still free when a server asks for it."""

import socket
from pathlib import Path

import pytest

from kervan import ports


def test_a_free_port_is_none_that_the_kernel_gives_to_connections() -> None:
    first = int(ports.EPHEMERAL.read_text().split()[0])
    for _ in range(20):
        port = ports.free_port()
        assert ports.FIRST <= port < first
        with socket.create_server(("127.0.0.1", port)):
            pass


def test_a_taken_port_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "EPHEMERAL", tmp_path / "range")
    ports.EPHEMERAL.write_text(f"{ports.FIRST + 2}\t60999\n")  # two to choose from
    with socket.create_server(("127.0.0.1", ports.FIRST)):
        assert {ports.free_port() for _ in range(20)} <= {ports.FIRST + 1, *range(ports.FIRST + 2, 65536)}
        with socket.create_server(("127.0.0.1", ports.FIRST + 1)):
            assert ports.free_port() > ports.FIRST + 1


@pytest.mark.parametrize("told", ["1024\t65535\n", None])
def test_where_the_kernel_has_all_ports_it_chooses(
    told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "EPHEMERAL", tmp_path / "range")
    if told is not None:
        ports.EPHEMERAL.write_text(told)
    assert 1024 <= ports.free_port() < 65536
