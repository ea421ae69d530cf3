"""kervan doctor over machines that are described, not asked: each check finds what it is for, and nothing else."""

import json
import re
import tomllib

import pytest
from harness import hosts
from harness.machines import GIB, folder, hub, machine, versions
from harness.places import REPOSITORY

from kervan.doctor import checks
from kervan.doctor.checks import RAY_VERSION, examine, is_exempt, own_checks
from kervan.doctor.machine import FleetAnswer, Machine, Port, to_json


def bad(found: Machine) -> dict[str, str]:
    return {check.name: check.verdict for check in examine(found) if check.verdict in ("warn", "fail")}


def test_a_machine_in_order_passes_every_check() -> None:
    found = examine(machine())
    assert {check.name: check.verdict for check in found if check.verdict != "pass"} == {}
    assert len(found) == len({check.name for check in found}) > 35


PROXY = "http_proxy=http://proxy:3128"
BROKEN = [
    ("an old Python", machine(versions=versions(python="3.10.2")), {"python": "fail"}),
    ("a Python that Ray does not take", machine(versions=versions(python_needs={"ray": "<3.14"})), {"python": "fail"}),
    ("no Ray", machine(versions=versions(ray="")), {"ray-version": "fail"}),
    ("another Ray", machine(versions=versions(ray="2.59.1")), {"ray-version": "fail"}),
    ("no vLLM", machine(versions=versions(vllm="", vllm_needs_torch="")), {"vllm-version": "fail"}),
    ("an old vLLM", machine(versions=versions(vllm="0.23.0")), {"vllm-version": "fail"}),
    ("a vLLM that comes", machine(versions=versions(vllm="0.34.0")), {"vllm-version": "fail"}),
    ("a vLLM between tested ones", machine(versions=versions(vllm="0.29.1")), {"vllm-version": "warn"}),
    ("another torch than vLLM's", machine(versions=versions(torch="2.12.0+cu129")), {"torch": "fail"}),
    ("torch for CPU", machine(versions=versions(torch_cuda="", torch="2.11.0+cpu")), {"cuda-driver": "fail"}),
    ("a driver too old for CUDA 12", machine(host=hosts.host(driver="520.61.05")), {"cuda-driver": "fail"}),
    ("a driver too old for CUDA 13", machine(versions=versions(torch_cuda="13.0"), host=hosts.host(driver="575.57.08")),
     {"cuda-driver": "fail"}),
    ("GPUs without a driver", machine(host=hosts.host(gpus=(), pairs=())), {"gpus": "fail"}),
    ("a GPU fell off the bus", machine(num_pci_gpus=9), {"gpus": "warn"}),
    ("Ray is silent", machine(ray_problem="the Ray cluster at 10.0.0.11:6379 does not answer"), {"ray": "fail"}),
    ("the fleet is not ready", machine(fleet=FleetAnswer(name="default", url="http://h:8000", problem="no replica")),
     {"fleet": "fail"}),
    ("someone has the port", machine(ports=(Port(number=8000, holder="nginx (pid 12)"),)), {"ports": "fail"}),
    ("no home", machine(home_problem="kervan cannot write to /root/.kervan"), {"kervan-home": "fail"}),
    ("1,024 open files", machine(nofile=(1024, 1 << 20)), {"nofile": "fail"}),
    ("4,096 open files", machine(nofile=(4096, 4096)), {"nofile": "warn"}),
    ("few processes", machine(max_processes=1000), {"processes": "warn"}),
    ("memory is nearly full", machine(memory_free_bytes=100 * GIB), {"memory": "warn"}),
    ("memory is full", machine(memory_free_bytes=40 * GIB), {"memory": "fail"}),
    ("a disk that is read-only", machine(folders=(folder(is_writable=False),)), {"disk": "fail"}),
    ("a disk that is full", machine(folders=(folder("Ray", free_bytes=40 * GIB),)), {"disk": "fail"}),
    ("no room for weights", machine(folders=(folder(free_bytes=15 * GIB, total_bytes=100 * GIB),)), {"disk": "warn"}),
    ("a clock that nobody keeps", machine(is_clock_synchronised=False), {"clock": "warn"}),
    ("clocks that differ", machine(fleet=FleetAnswer(name="d", url="http://h:8000", clock_ahead_s=-9.0)),
     {"clock": "fail"}),
    ("autogroups", machine(starvation="Linux 6.18.44 starves sessions; sudo sysctl -w x=0"), {"autogroups": "warn"}),
    ("a cache of root's", machine(hub=hub(is_writable=False)), {"hf-cache": "fail"}),
    ("offline with nothing there", machine(hub=hub(offline="HF_HUB_OFFLINE=1", num_models=0)), {"hf-cache": "warn"}),
    ("no token", machine(hub=hub(token_problem="what is there does not look like a token")), {"hf-token": "warn"}),
    ("a proxy for all", machine(proxy=PROXY), {"proxies": "fail"}),
    ("a proxy for this node", machine(proxy=PROXY, no_proxy=("localhost", "127.0.0.1")), {"proxies": "warn"}),
    # what kervan comm doctor checks, too
    ("64 MB of shared memory", machine(host=hosts.host(shm_bytes=64 << 20, shm_free_bytes=64 << 20)), {"shm": "fail"}),
    ("memlock", machine(host=hosts.host(memlock_bytes=65536)), {"memlock": "fail"}),
    ("a wrong interface", machine(host=hosts.with_settings("NCCL_SOCKET_IFNAME=ens5")), {"interface": "fail"}),
    ("MIG", machine(host=hosts.with_gpu(2, has_mig=True)), {"mig": "fail"}),
    ("peer access off", machine(host=hosts.with_settings("NCCL_P2P_DISABLE=1")), {"transports-off": "fail"}),
    ("a level that is none", machine(host=hosts.with_settings("NCCL_DEBUG=ERROR")), {"debug": "warn"}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "found", "expected"), BROKEN, ids=[row[0] for row in BROKEN])
def test_what_is_wrong_is_found_and_nothing_else(what: str, found: Machine, expected: dict[str, str]) -> None:
    assert bad(found) == expected | ({"vllm-version": "fail"} if what == "no vLLM" else {})


def test_every_check_of_its_own_has_a_machine_that_it_objects_to() -> None:
    assert {check.name for check in own_checks(machine())} <= {name for _, _, expected in BROKEN for name in expected}


@pytest.mark.parametrize(("what", "found", "expected"), BROKEN, ids=[row[0] for row in BROKEN])
def test_a_check_that_objects_says_in_a_line_each_what_it_found_and_what_to_do(
    what: str, found: Machine, expected: dict[str, str]
) -> None:
    for check in examine(found):
        assert check.cause and "\n" not in check.cause + check.fix
        assert bool(check.fix) == (check.verdict in ("warn", "fail")), check


def test_a_laptop_without_gpus_ray_or_fleet_fails_nothing() -> None:
    bare = machine(
        host=hosts.host(gpus=(), pairs=(), rdma=()), num_pci_gpus=0, ray_address="", fleet=None,
        versions=versions(torch_cuda="", torch="2.13.0+cpu", vllm_needs_torch="==2.13.0+cpu"), hub=None, folders=(),
        memory_bytes=0, ports=(Port(number=8000),), is_clock_synchronised=None,
    )  # fmt: skip
    assert bad(bare) == {}


def test_the_fix_for_a_proxy_keeps_what_goes_without_it_already() -> None:
    (check,) = (c for c in examine(machine(proxy=PROXY, no_proxy=("corp.example",))) if c.name == "proxies")
    assert "no_proxy=corp.example,127.0.0.1,localhost,10.0.0.11" in check.fix


@pytest.mark.parametrize(("hard", "fix"), [(1 << 20, "ulimit -n 65536"), (4096, "raise the hard limit to 65536")])
def test_open_files_are_raised_by_ulimit_as_far_as_the_hard_limit_lets_it(hard: int, fix: str) -> None:
    (check,) = (c for c in examine(machine(nofile=(1024, hard))) if c.name == "nofile")
    assert check.fix.startswith(fix)


@pytest.mark.parametrize(
    ("host", "no_proxy", "exempt"),
    [
        ("10.0.0.11", "10.0.0.0/8", True), ("10.0.0.11", "10.0.0.1", False), ("127.0.0.1", "*", True),
        ("node.corp.example", ".corp.example", True), ("node.corp.example", "corp.example", True),
        ("localhost", "127.0.0.1", False), ("10.0.0.11", "10.0.0.*", True), ("10.0.0.11", "", False),
    ],
)  # fmt: skip
def test_no_proxy_is_read_as_curl_and_python_read_it(host: str, no_proxy: str, exempt: bool) -> None:
    assert is_exempt(host, tuple(filter(None, no_proxy.split(",")))) is exempt


def test_the_versions_are_those_that_kervan_is_packaged_with() -> None:
    packaged = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert f"ray[serve]=={RAY_VERSION}" in packaged["optional-dependencies"]["serve"]
    assert packaged["requires-python"] == f">={'.'.join(map(str, checks.MIN_PYTHON))}"
    (vllm,) = (line for line in packaged["optional-dependencies"]["gpu"] if line.startswith("vllm"))
    bounds = [tuple(map(int, text.split("."))) for text in re.findall(r"\d+\.\d+", vllm)]
    assert bounds == [checks.vllm_versions.MIN_VERSION, checks.vllm_versions.MAX_VERSION]


def test_a_machine_is_json() -> None:
    assert json.loads(json.dumps(to_json(machine())))["fleet"]["name"] == "default"
