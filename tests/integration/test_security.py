"""What docs/security.md says, on running fleets: where they listen, what has their secrets, and how keys change."""

import asyncio
import json
import re
import ssl
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
from harness.certificates import Ca
from harness.live import Fleet, eventually_async
from harness.places import DOCS
from harness.shared_fleet import Models
from harness.shared_twins import NAMED
from harness.twin_load import STEP_S, kervan, load

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(600)]

API_KEY = "sk-a-key-that-nobody-else-has"
ANY = {"::", "0.0.0.0"}
TABLE = re.search(r"<!-- ports -->\n\|.*\n\|.*\n((?:\|.*\n)+)", (DOCS / "security.md").read_text())


def documented() -> list[tuple[str, str]]:
    """Process and address of each row; a row may have several addresses."""
    assert TABLE is not None
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in TABLE[1].splitlines()]
    places = [(row[0].lower(), place) for row in cells for place in row[1].partition(" by ")[0].split(", ")]
    return [(process, "host" if place == "loopback" else place) for process, place in places if "--host" not in place]


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
    documented_kinds = {kind for name, kind in table if name.startswith("ray")}
    assert {"all", "node"} <= found <= documented_kinds  # its agents are not always on loopback


def secrets_of(fleet: Fleet) -> list[str]:
    """The fleet's secret and the one before, as the directory gives them to what starts; "-" for none."""
    ask = (
        "from kervan.serve.attach import attach; "
        f"print(*[one or '-' for one in attach({fleet.name!r}, None).fleet().result()[1:]])"
    )
    return subprocess.run(
        [sys.executable, "-c", ask], env=fleet.home.environment, cwd=fleet.home.scratch, text=True, check=True,
        capture_output=True, timeout=120,
    ).stdout.split()[-2:]  # fmt: skip


async def test_keys_change_under_load_and_no_stream_breaks(twins: Fleet, models: Models, tmp_path: Path) -> None:
    """Over HTTPS: the certificate is another one too in the end, without a restart."""
    ca = Ca(tmp_path)
    certificate, key = ca.issue()
    fleet = await asyncio.to_thread(
        twins.home.up, models.demo, "keys", NAMED,
        "--engine", "twin", "--gpu", "H200", "--twin", f"base_s={STEP_S}", "--replicas", "2", "--gateways", "1",
        "--tls-certificate", str(certificate), "--tls-key", str(key), "--api-key", API_KEY,
    )  # fmt: skip
    assert fleet.url.startswith("https://")
    (before, none), old = secrets_of(fleet), fleet.status()
    assert none == "-"
    async with load(fleet, models, api_key=API_KEY):
        done = await kervan(fleet, "rotate-keys")
        assert "generation 1" in done
        ca.issue()
        await eventually_async(lambda: is_served(fleet.port, certificate), "the new certificate", 20)
    new = fleet.status()
    assert secrets_of(fleet)[1] == before != secrets_of(fleet)[0]
    for kind in ("replicas", "gateways"):
        assert {one["id"] for one in old[kind]}.isdisjoint(one["id"] for one in new[kind])
    async with httpx.AsyncClient(verify=ssl.create_default_context(cafile=str(ca.path))) as client:
        (await client.get(f"{fleet.url}/health")).raise_for_status()
    logs = [path.read_text(errors="replace") for path in fleet.home.path.rglob("*.log")]
    assert not any(secret in log for log in logs for secret in (API_KEY, before, secrets_of(fleet)[0]))
    assert API_KEY not in json.dumps(new)
    assert fleet.home.kervan("down", "--name", "keys").returncode == 0


def is_served(port: int, certificate: Path) -> bool:
    """Whether a new connection gets it."""
    shown = ssl.get_server_certificate(("127.0.0.1", port))
    return ssl.PEM_cert_to_DER_cert(shown) == ssl.PEM_cert_to_DER_cert(certificate.read_text())


def _words(pid: int) -> list[str]:
    try:
        return psutil.Process(pid).cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def test_no_command_line_log_or_status_has_a_secret(twins: Fleet) -> None:
    """`ps` and `kervan status --json`; the secret is what the directory gives to gateways."""
    secret, _ = secrets_of(twins)
    assert re.fullmatch("[0-9a-f]{64}", secret)
    shown = [" ".join(_words(pid)) for pid in psutil.pids()]
    logs = [path.read_text(errors="replace") for path in twins.home.path.rglob("*.log")]
    assert logs
    status = json.dumps(twins.status())
    pages = [twins.get("/metrics").text, twins.get(f"/kervan/status?fleet={twins.name}").text]
    assert not [text[:200] for text in [*shown, *logs, *pages, status] if secret in text]
