"""The doctor's checks over hosts that are described, not asked: what is wrong is found, and nothing else."""

import json
from typing import Any

import pytest
from harness import hosts
from harness.hosts import GIB, gpu, host, measured, pairs, rank, with_gpu, with_settings

from kervan.comm import doctor, facts, preflight, settings_checks
from kervan.comm.check import Check, matches
from kervan.comm.facts import HostFacts, Interface, Measured, PairSpeed, RdmaPort, Reduced


def bad(found: list[Check]) -> dict[str, str]:
    """Verdicts of the checks that are not passed."""
    return {check.name: check.verdict for check in found if check.verdict in ("warn", "fail")}


def verdicts(facts_of: HostFacts, found: Measured | None = None, *, nodes: int = 1) -> dict[str, str]:
    return bad(doctor.examine_host(facts_of, found or measured(), nodes=nodes))


@pytest.mark.parametrize("nodes", [1, 4])
def test_a_healthy_host_of_eight_h200_passes_every_check(nodes: int) -> None:
    found = doctor.examine_host(host(), measured(), nodes=nodes)
    assert {check.name: check.verdict for check in found if check.verdict != "pass"} == {}
    assert len(found) == len({check.name for check in found}) > 40


ETH0 = Interface(name="eth0", addresses=("10.0.0.11",), has_default_route=True)
BRIDGE = Interface(name="br-4f2a", addresses=("172.18.0.1",), kind="bridge")
DOCKER = Interface(name="docker0", addresses=("172.17.0.1",), kind="bridge")
RAIL = RdmaPort(device="mlx5_0", rate_gbit_s=400.0, gpu_paths=("PIX",) * 8)
PCIE_A100 = tuple(
    gpu(
        i, name="NVIDIA A100-SXM4-80GB", nvlinks_active=0, nvlinks_inactive=12, pcie_generation=4, max_pcie_generation=4
    )
    for i in range(8)
)


@pytest.mark.parametrize(
    ("what", "facts_of", "expected"),
    [
        ("A100 whose NVLinks are all down", host(gpus=PCIE_A100, pairs=pairs("SYS", peer=True)),
         {"nvlink": "fail", "gpu-paths": "warn"}),
        ("one dead link", with_gpu(3, nvlinks_active=17, nvlinks_inactive=1), {"nvlink": "fail"}),
        ("fabric manager not ready", with_gpu(0, fabric="in progress"), {"fabric": "fail"}),
        ("no peer access", host(pairs=pairs(peer=False)), {"peer-access": "fail"}),
        ("two kinds of GPU", with_gpu(7, name="NVIDIA H100 80GB HBM3"), {"gpu-kinds": "warn"}),
        ("MIG", with_gpu(2, has_mig=True), {"mig": "fail"}),
        ("power cap", with_gpu(1, power_limit_w=500.0), {"power-cap": "warn"}),
        ("errors of memory", with_gpu(1, ecc_uncorrected=2), {"ecc": "warn"}),
        ("a row to be remapped", with_gpu(1, remap_pending=True), {"ecc": "fail"}),
        ("an Xid", host(xid_lines=("NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus",)), {"xid": "warn"}),
        ("64 MB of shared memory", host(shm_bytes=64 << 20, shm_free_bytes=64 << 20), {"shm": "fail"}),
        ("shared memory full", host(shm_free_bytes=100 << 20), {"shm": "warn"}),
        ("no /dev/shm", host(shm_bytes=None), {"shm": "fail"}),
        ("memlock", host(memlock_bytes=65536), {"memlock": "fail"}),
        ("no GPUDirect", host(has_peermem=False, has_dmabuf=False), {"gpudirect": "warn"}),
        ("ACS beside NVLink", host(acs_bridges=("0000:00:01.0",)), {"acs": "warn"}),
        ("ACS over PCIe", host(acs_bridges=("0000:00:01.0",), pairs=pairs("PIX")), {"acs": "fail"}),
        ("IOMMU", host(iommu="translated"), {"iommu": "warn"}),
        ("one rail", host(rdma=(RAIL,)), {"rails": "warn"}),
        ("a port is down", host(rdma=tuple(RdmaPort(device=f"mlx5_{n}", state="DOWN" if n == 2 else "ACTIVE",
                                                    rate_gbit_s=400.0, gpu_paths=("PIX",) * 8) for n in range(8))),
         {"rdma-ports": "warn"}),
        ("docker's bridge first", host(interfaces=(BRIDGE, DOCKER, ETH0)), {"interface": "warn"}),
        ("docker0 is passed over", host(interfaces=(DOCKER, ETH0)), {}),
        ("a pinned rail", with_settings("NCCL_IB_HCA==mlx5_0"), {"hca": "warn"}),
        ("no such card", with_settings("NCCL_IB_HCA=bnxt_re0"), {"hca": "fail"}),
        ("a wrong interface", with_settings("NCCL_SOCKET_IFNAME=ens5"), {"interface": "fail"}),
        ("the loopback", with_settings("NCCL_SOCKET_IFNAME=lo"), {"interface": "warn"}),
        ("the right interface", with_settings("NCCL_SOCKET_IFNAME==eth0"), {}),
        ("gloo's interface", with_settings("GLOO_SOCKET_IFNAME=eth"), {"interface": "fail"}),
        ("peer access off", with_settings("NCCL_P2P_DISABLE=1"), {"transports-off": "fail"}),
        ("shared memory off", with_settings("NCCL_SHM_DISABLE=1"), {"transports-off": "fail"}),
        ("IB off on one node", with_settings("NCCL_IB_DISABLE=1"), {}),
        ("a default", with_settings("NCCL_P2P_DISABLE=0"), {"no-effect": "warn"}),
        ("IB without a card", with_settings("NCCL_IB_TIMEOUT=22", rdma=()), {"no-effect": "warn"}),
        ("ERROR is no level", with_settings("NCCL_DEBUG=ERROR"), {"debug": "warn"}),
        ("INFO", with_settings("NCCL_DEBUG=INFO"), {"debug": "warn"}),
        ("an algorithm", with_settings("NCCL_ALGO=Tree"), {"tuning-pinned": "warn"}),
        ("NVLS off is the owner's choice", with_settings("NCCL_NVLS_ENABLE=0"), {"nvls": "warn"}),
        ("socket threads beside RDMA", with_settings("NCCL_SOCKET_NTHREADS=8", "NCCL_NSOCKS_PERTHREAD=4"),
         {"socket-threads": "warn"}),
        ("too many sockets", with_settings("NCCL_SOCKET_NTHREADS=16", "NCCL_NSOCKS_PERTHREAD=8", rdma=()),
         {"socket-threads": "warn"}),
        ("a GPU twice", with_settings("CUDA_VISIBLE_DEVICES=0,1,1"), {"visible-devices": "fail"}),
        ("a GPU that is not there", with_settings("CUDA_VISIBLE_DEVICES=0,8"), {"visible-devices": "fail"}),
        ("no handling of errors", with_settings("TORCH_NCCL_ASYNC_ERROR_HANDLING=0"), {"timeouts": "warn"}),
        ("a short heartbeat", with_settings("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=10"), {"timeouts": "warn"}),
        ("no RAS", with_settings("NCCL_RAS_ENABLE=0"), {"ras-on": "warn"}),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_host_is_found_and_nothing_else(
    what: str, facts_of: HostFacts, expected: dict[str, str]
) -> None:
    assert verdicts(facts_of) == expected


def test_what_one_node_can_live_with_is_fatal_on_several() -> None:
    lonely = host(interfaces=(BRIDGE, ETH0))
    assert verdicts(lonely, nodes=2)["interface"] == "fail"
    assert verdicts(with_settings("NCCL_IB_DISABLE=1"), nodes=2)["transports-off"] == "fail"
    assert verdicts(with_settings("NCCL_IB_HCA==mlx5_0"), nodes=2)["hca"] == "fail"
    assert verdicts(host(has_peermem=False, has_dmabuf=False), nodes=2)["gpudirect"] == "fail"


SLOW_3 = tuple(PairSpeed(a=p.a, b=p.b, gb_s=60.0 if 3 in (p.a, p.b) else 350.0) for p in measured().pairs)
LARGE = 256 << 20


@pytest.mark.parametrize(
    ("what", "found", "expected"),
    [
        ("half the bandwidth", {"reduced": (Reduced(bytes=LARGE, mode="graph", time_us=1, busbw_gb_s=210.0),)},
         {"bandwidth": "fail"}),
        ("a wrong sum", {"reduced": (Reduced(bytes=LARGE, mode="eager", time_us=1, busbw_gb_s=440.0, num_wrong=3),)},
         {"results": "fail"}),
        ("a slow GPU's pairs", {"pairs": SLOW_3}, {"slow-pair": "fail"}),
        ("a wrong pair", {"pairs": (*measured().pairs[:-1], PairSpeed(a=6, b=7, gb_s=350, num_wrong=1))},
         {"results": "fail"}),
        ("a slow GPU", {"ranks": (*(rank(i) for i in range(7)), rank(7, copy_gb_s=2000.0))}, {"slow-rank": "fail"}),
        ("mixed NCCL", {"ranks": (*(rank(i) for i in range(7)), rank(7, nccl="2.21.5"))}, {"versions": "fail"}),
        ("mixed drivers", {"ranks": (*(rank(i) for i in range(7)), rank(7, driver="550.1"))}, {"versions": "warn"}),
        ("settings differ", {"ranks": (rank(0), rank(1, settings=("NCCL_ALGO=Ring",)))}, {"settings-differ": "fail"}),
        ("clocks apart", {"ranks": (rank(0), rank(1, clock_s=-3.0))}, {"clock-skew": "warn"}),
        ("bound to far CPUs", {"ranks": (rank(0), rank(1, cpus=4, far_cpus=4))}, {"cpu-binding": "warn"}),
        ("through shared memory", {"transports": {"SHM/direct": 16}}, {"transport": "fail"}),
        ("through sockets", {"transports": {"NET/Socket": 16}}, {"transport": "fail"}),
        ("throttled", {"loaded": tuple(gpu(i, slowdowns=("hardware thermal slowdown",) if i == 5 else ())
                                       for i in range(8))}, {"clocks": "fail"}),
        ("at the power cap", {"loaded": (gpu(0, slowdowns=("software power cap",)),)}, {"clocks": "warn"}),
        ("locked clocks", {"loaded": (gpu(0, sm_clock_mhz=900),)}, {"clocks": "warn"}),
        ("half the lanes", {"loaded": (gpu(4, pcie_lanes=8),)}, {"pcie": "fail"}),
        ("an older PCIe under load", {"loaded": (gpu(4, pcie_generation=1),)}, {"pcie": "warn"}),
        ("a warning of NCCL", {"warnings": ("Missing iommu=pt",)}, {"nccl-warnings": "warn"}),
        ("a rank that is gone", {"ras": ("DEAD: 1 job process is considered dead",)}, {"ras-report": "fail"}),
        ("NCCL's own check", {"diagnostics": ("[INFO] p2p: only 52/56 GPU-to-GPU peer accesses passed verification",)},
         {"nccl-diagnostics": "fail"}),
        ("a hang", {"problem": "2 of 8 ranks had not ended after 60 s"}, {"measurement": "fail"}),
    ],
)  # fmt: skip
def test_what_a_measurement_shows_is_found_and_nothing_else(
    what: str, found: dict[str, Any], expected: dict[str, str]
) -> None:
    assert verdicts(host(), measured(**found)) == expected


def test_the_slow_gpu_of_several_slow_pairs_is_named() -> None:
    check = next(c for c in doctor.examine_host(host(), measured(pairs=SLOW_3)) if c.name == "slow-pair")
    assert "all have rank 3 (GPU 3 NVIDIA H200 on node-1)" in check.cause


def test_every_check_that_is_not_passed_says_what_to_do() -> None:
    worst = host(
        gpus=tuple(gpu(i, nvlinks_active=0, has_mig=True, remap_pending=True) for i in range(8)),
        pairs=pairs("SYS", peer=False), shm_bytes=1, memlock_bytes=1, interfaces=(), acs_bridges=("b",), rdma=(RAIL,),
    )  # fmt: skip
    for check in doctor.examine_host(worst, measured(problem="it hangs"), nodes=2):
        assert bool(check.fix) == (check.verdict in ("warn", "fail")), check
        assert check.cause


def test_a_host_without_a_gpu_is_not_blamed_for_it() -> None:
    plain = HostFacts(host="h", shm_bytes=8 * GIB, shm_free_bytes=8 * GIB, memlock_bytes=65536, interfaces=(ETH0,))
    assert bad(doctor.examine_host(plain, None)) == {}


def test_facts_go_through_json_unchanged() -> None:
    value = json.loads(json.dumps(facts.to_json(host())))
    assert facts.host_from_json(value) == host()


def test_a_file_is_overruled_by_the_environment_and_named() -> None:
    settings = (
        facts.Setting(name="NCCL_ALGO", value="Ring"),
        facts.Setting(name="NCCL_ALGO", value="Tree", source="/etc/nccl.conf:3"),
        facts.Setting(name="NCCL_SHM_DISABLE", value="1", source="/etc/nccl.conf:4"),
    )
    found = {check.name: check for check in doctor.examine_host(host(settings=settings), measured())}
    assert "NCCL_ALGO=Tree (/etc/nccl.conf:3) is overruled by NCCL_ALGO=Ring (environment)" in found["no-effect"].cause
    assert "the line /etc/nccl.conf:4" in found["transports-off"].fix


# ---- what is recommended


def lines(facts_of: HostFacts, *, nodes: int = 1) -> dict[str, str]:
    return {advice.name: advice.value for advice in settings_checks.advice(facts_of, nodes=nodes)}


def test_the_environment_for_a_healthy_host_is_short() -> None:
    assert set(lines(host(), nodes=4)) == {"NCCL_DEBUG", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"}


def test_what_hurts_is_to_be_unset_and_the_right_interface_is_named() -> None:
    found = lines(with_settings("NCCL_P2P_DISABLE=1", "NCCL_IB_HCA=mlx5_0", interfaces=(BRIDGE, ETH0)), nodes=2)
    assert found["NCCL_P2P_DISABLE"] == found["NCCL_IB_HCA"] == ""
    assert (found["NCCL_SOCKET_IFNAME"], found["GLOO_SOCKET_IFNAME"]) == ("=eth0", "eth0")


def test_multicast_is_never_turned_on() -> None:
    assert "NCCL_NVLS_ENABLE" not in lines(with_settings("NCCL_NVLS_ENABLE=0"))


@pytest.mark.parametrize(
    ("pattern", "name", "taken"),
    [
        ("eth", "eth0", True), ("=eth", "eth0", False), ("=eth0", "eth0", True), ("^docker,lo", "docker0", False),
        ("^docker,lo", "eth0", True), ("mlx5_1", "mlx5_10:1", True), ("=mlx5_1", "mlx5_10:1", False),
        ("=mlx5_1:1", "mlx5_1:1", True), ("mlx5_1:2", "mlx5_1:1", False), ("mlx5_0,mlx5_1", "mlx5_1:1", True),
    ],
)  # fmt: skip
def test_names_are_matched_as_nccl_does(pattern: str, name: str, taken: bool) -> None:
    assert matches(pattern, name) is taken


# ---- the preflight


def test_a_host_in_order_is_not_refused_and_neither_is_one_that_only_warns() -> None:
    assert preflight.refusal(host(), measured()) == ""
    assert preflight.refusal(with_settings("NCCL_NVLS_ENABLE=0", "NCCL_DEBUG=INFO"), measured()) == ""
    slow = measured(reduced=(Reduced(bytes=LARGE, mode="graph", time_us=1, busbw_gb_s=0.6 * 427),))
    assert preflight.refusal(host(), slow) == ""  # the doctor fails below 80%, the preflight refuses below half


def test_replicas_that_start_beside_each_other_over_pcie_are_not_refused_for_sharing_it() -> None:
    gpus = tuple(gpu(i, name="NVIDIA L40S", nvlinks_active=None, nvlinks_inactive=None) for i in range(4))
    shared = host(gpus=gpus, pairs=pairs("PIX", num=4))
    # 32 GB/s x 0.76 = 24 GB/s is the figure; replicas that start beside each other may leave a quarter of it
    slow = measured(
        ranks=tuple(rank(i) for i in range(4)), reduced=(Reduced(bytes=LARGE, mode="graph", time_us=1, busbw_gb_s=6.0),)
    )
    assert verdicts(shared, slow)["bandwidth"] == "fail"
    assert preflight.refusal(shared, slow) == ""


def test_shared_memory_that_is_enough_for_one_replica_is_not_refused() -> None:
    assert preflight.refusal(host(shm_bytes=512 << 20), measured()) == ""
    assert "shm: /dev/shm has" in preflight.refusal(host(shm_bytes=64 << 20, shm_free_bytes=0), measured())


def test_a_refusal_is_one_line_with_the_host_the_cause_and_the_way_out() -> None:
    slow = measured(reduced=(Reduced(bytes=LARGE, mode="graph", time_us=1, busbw_gb_s=20.0),))
    line = preflight.refusal(with_settings("NCCL_P2P_DISABLE=1"), slow)
    assert line.startswith(
        "host node-1 fails the preflight: bandwidth: busbw of 8 GPUs 20 GB/s at 256 MiB, 5% of the 428"
    )
    assert "NCCL_P2P_DISABLE=1 (environment)" in line
    assert line.endswith("--no-preflight starts all the same")
    assert "\n" not in line


def test_a_measurement_that_hangs_is_refused_by_what_hangs() -> None:
    line = preflight.refusal(host(), measured(problem="a collective hangs: rank 1 (pid 7) is stopped"))
    assert "measurement: a collective hangs: rank 1 (pid 7) is stopped" in line


def test_the_fake_host_is_one_of_the_table_of_gpus() -> None:
    from kervan.facts import hardware

    assert hardware.find(hosts.gpu(0).name) is not None


def test_the_size_of_shared_memory_is_written_in_digits() -> None:
    found = doctor.examine_host(host(shm_bytes=126 * GIB, shm_free_bytes=120 * GIB), measured())
    (check,) = (c for c in found if c.name == "shm")
    assert check.cause == "/dev/shm has 126 GiB, 120 GiB free"


def test_one_gpu_needs_no_multicast() -> None:
    lone = with_settings("NCCL_NVLS_ENABLE=0", gpus=host().gpus[:1], pairs=())
    assert "nvls" not in bad(doctor.examine_host(lone, None))
