"""A running fleet listens where docs/security.md says, and nowhere else."""

import json
import re
import subprocess
import sys

import psutil
import pytest
from harness.live import Fleet
from harness.places import DOCS

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600)]

ANY = {"::", "0.0.0.0"}
TABLE = re.search(r"<!-- ports -->\n\|.*\n\|.*\n((?:\|.*\n)+)", (DOCS / "security.md").read_text())


def documented() -> list[tuple[str, str]]:
    """Process and address of each row."""
    assert TABLE is not None
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in TABLE[1].splitlines()]
    return [(row[0].lower(), "host" if "--host" in row[1] else row[1]) for row in cells]


def listening(pid: int) -> list[str]:
    """The addresses of a process's listening TCP sockets, and of its bound UDP ones."""
    try:
        connections = psutil.Process(pid).net_connections("inet")
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
    return [c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN or (c.status == "NONE" and c.laddr)]


def ray_of(pid: int) -> psutil.Process:
    """The process of the Ray in which an engine runs."""
    return next(p for p in psutil.Process(pid).parents() if "kervan.serve.local_ray" in " ".join(p.cmdline()))


def kind_of(address: str, node: str) -> str:
    if address in ANY:
        return "all"
    return "node" if address == node else "host" if address == "127.0.0.1" else address


def test_a_fleet_listens_where_its_page_says_and_nowhere_else(twins: Fleet) -> None:
    status, table = twins.status(), documented()
    replicas, gateways = status["replicas"], status["gateways"]
    node = replicas[0]["node"]
    own = {"replica": [r["pid"] for r in replicas], "gateway": [g["pid"] for g in gateways]}
    for process, pids in own.items():
        expected = sorted(kind for name, kind in table if name == process)
        if process == "replica":
            expected *= 2  # "two free ones"
        for pid in pids:
            assert sorted(kind_of(address, node) for address in listening(pid)) == expected, process
    ray = ray_of(own["replica"][0])
    others = [ray.pid, *(child.pid for child in ray.children(recursive=True))]
    engines = {pid for pid in others if "kervan.twin.replica" in " ".join(_words(pid))}
    found = {
        kind_of(address, node) for pid in set(others) - engines - set(own["gateway"]) for address in listening(pid)
    }
    assert found == {kind for name, kind in table if name == "ray"}


def _words(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def test_no_command_line_log_or_status_has_a_secret(twins: Fleet) -> None:
    """`ps` and `kervan status --json`; the secret is what the directory gives to gateways."""
    ask = f"from kervan.serve.attach import attach; print(attach({twins.name!r}, None).fleet().result().secret)"
    secret = subprocess.run(
        [sys.executable, "-c", ask], env=twins.home.environment, cwd=twins.home.scratch, text=True, check=True,
        capture_output=True, timeout=120,
    ).stdout.split()[-1]  # fmt: skip
    assert re.fullmatch("[0-9a-f]{64}", secret)
    shown = [" ".join(_words(pid)) for pid in psutil.pids()]
    logs = [path.read_text(errors="replace") for path in twins.home.path.rglob("*.log")]
    assert logs
    status = json.dumps(twins.status())
    pages = [twins.get("/metrics").text, twins.get(f"/kervan/status?fleet={twins.name}").text]
    assert not [text[:200] for text in [*shown, *logs, *pages, status] if secret in text]
