"""What NCCL, nvidia-smi, all_reduce_perf and Linux print, read: samples after NVIDIA's guides and sources."""

from pathlib import Path
from typing import Any

import pytest

from kervan.comm import gather, nccl_log, nccl_tests
from kervan.observe import gpu_state

LOG = """node1:811:811 [0] NCCL INFO Bootstrap: Using eth0:10.0.0.11<0>
node1:811:811 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
node1:811:840 [0] NCCL INFO NVLS multicast support is not available on dev 0 (NVLS_NCHANNELS 0)
node1:811:840 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM
node1:811:840 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM/read
node1:811:840 [0] NCCL INFO Channel 00 : 1[1] -> 0[0] via SHM/direct/direct
node1:811:840 [0] NCCL INFO Channel 00/0 : 0[0] -> 8[0] [send] via NET/IB/0/GDRDMA
node1:811:840 [0] NCCL WARN Missing "iommu=pt" from kernel command line which can lead to system instability or hang!
"""
DIAGNOSTICS = """NCCL DIAG === NCCL Diagnostics ===
NCCL DIAG [INFO] p2p: only 52/56 GPU-to-GPU peer accesses passed verification
NCCL DIAG NCCL diagnostics completed in 245.3 ms across 8 ranks
"""


def test_nccl_log_names_transports_and_warnings() -> None:
    log = nccl_log.parse([LOG, LOG])
    assert log.transports == {"P2P/CUMEM": 4, "SHM/direct": 2, "NET/IB": 2}
    assert (log.version, log.nvls, log.diagnostics) == ("2.28.9", False, None)
    assert len(log.warnings) == 1
    assert log.warnings[0].startswith('Missing "iommu=pt"')


def test_nccl_diagnostics_are_judged_by_their_tags() -> None:
    found = nccl_log.parse([DIAGNOSTICS]).diagnostics
    assert found is not None
    assert nccl_log.failed_diagnostics(found) == ["[INFO] p2p: only 52/56 GPU-to-GPU peer accesses passed verification"]


PERF = """# nThread 1 nGpus 2 minBytes 8 maxBytes 268435456 step: 2(factor) warmup iters: 1 iters: 20 agg iters: 1 validation: 1
#       size         count      type   redop    root     time   algbw   busbw  #wrong     time   algbw   busbw  #wrong
#        (B)    (elements)                               (us)  (GB/s)  (GB/s)             (us)  (GB/s)  (GB/s)
           8             4  bfloat16     sum      -1    10.12    0.00    0.00       0     9.98    0.00    0.00       0
   268435456     134217728  bfloat16     sum      -1    898.1  298.90  298.90       0    899.4  298.46  298.46     N/A
# Out of bounds values : 0 OK
# Avg bus bandwidth    : 149.342
"""


def test_all_reduce_perf_rows_in_place_are_read() -> None:
    small, large = nccl_tests.parse(PERF)
    assert (small.bytes, small.time_us, small.num_wrong) == (8, 9.98, 0)
    assert (large.bytes, large.busbw_gb_s, large.num_wrong) == (268435456, 298.46, None)


# ---- GPUs


def test_the_state_of_a_gpu_as_nvidia_smi_prints_it() -> None:
    line = (
        "1, GPU-5e, NVIDIA H200, 00000000:02:00.0, Disabled, 1, 16, 5, 16, 345, 1980, 0x0000000000000044, 650.00, "
        "700.00, 31, 0, No, No"
    )
    links = gpu_state.parse_links("GPU 0: NVIDIA H200 (UUID: GPU-4e)\n\t Link 0: 26.562 GB/s\n"
                                  "GPU 1: NVIDIA H200 (UUID: GPU-5e)\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n")  # fmt: skip
    assert links == {0: (1, 0), 1: (1, 1)}
    (state,) = gpu_state.parse_query(line + "\nnot a row\n", links)
    assert (state.index, state.pcie_generation, state.max_pcie_generation, state.pcie_lanes) == (1, 1, 5, 16)
    assert (state.nvlinks_active, state.nvlinks_inactive) == (1, 1)
    assert state.slowdowns == ("software power cap", "hardware thermal slowdown")
    assert (state.power_limit_w, state.ecc_uncorrected, state.remap_pending) == (650.0, 0, False)


def test_what_an_old_driver_does_not_know_is_unknown() -> None:
    line = "0, GPU-1, Tesla T4, 00000000:00:04.0, [N/A], 3, 8, 3, 16, 300, 1590, 0x1, [N/A], [N/A], 40, [N/A], [N/A], [N/A]"
    (state,) = gpu_state.parse_query(line, {})
    assert (state.nvlinks_active, state.ecc_uncorrected, state.remap_failed, state.power_limit_w) == (
        None,
        None,
        None,
        0,
    )
    assert state.slowdowns == ()


class FakeNvml:
    """One GPU with two links of which one is down, and a driver that does not know the newer functions."""

    class NVMLError(Exception):
        pass

    NVML_NVLINK_MAX_LINKS, NVML_FEATURE_ENABLED, NVML_FEATURE_DISABLED = 4, 1, 0
    NVML_DEVICE_MIG_ENABLE, NVML_CLOCK_SM = 1, 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        return index

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:  # noqa: N802
        if link > 1:
            raise self.NVMLError
        return link

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: int) -> int:  # noqa: N802
        return 0x8

    def nvmlDeviceGetRemappedRows(self, handle: int) -> tuple[int, ...]:  # noqa: N802
        return 0, 1, 1, 0


def test_the_state_of_a_gpu_by_nvml_with_an_older_driver() -> None:
    (state,) = gpu_state.read_with(FakeNvml())
    assert (state.nvlinks_active, state.nvlinks_inactive) == (1, 1)
    assert state.slowdowns == ("hardware slowdown",)
    assert (state.remap_pending, state.remap_failed, state.ecc_uncorrected) == (True, False, None)


# ---- Linux


def test_nccl_conf_has_comments_and_its_lines_are_named() -> None:
    found = gather.parse_conf("# site\nNCCL_DEBUG=WARN\n\nNCCL_IB_HCA = mlx5_0 # one rail\n", "/etc/nccl.conf")
    assert [(s.name, s.value, s.source) for s in found] == [
        ("NCCL_DEBUG", "WARN", "/etc/nccl.conf:2"),
        ("NCCL_IB_HCA", "mlx5_0", "/etc/nccl.conf:4"),
    ]


def test_the_environment_comes_before_the_users_file(tmp_path: Path) -> None:
    conf = tmp_path / "nccl.conf"
    conf.write_text("NCCL_ALGO=Tree\nNCCL_PROTO=LL\n")
    environ = {"NCCL_ALGO": "Ring", "NCCL_CONF_FILE": str(conf), "PATH": "/bin"}
    found = [(s.name, s.value) for s in gather.settings(environ)]
    assert found[:4] == [
        ("NCCL_ALGO", "Ring"),
        ("NCCL_CONF_FILE", str(conf)),
        ("NCCL_ALGO", "Tree"),
        ("NCCL_PROTO", "LL"),
    ]


def pci_config(*capabilities: tuple[int, int, int]) -> bytes:
    """A configuration space with extended capabilities: where, which, and the word at its byte 6."""
    space = bytearray(4096)
    for number, (at, which, control) in enumerate(capabilities):
        following = capabilities[number + 1][0] if number + 1 < len(capabilities) else 0
        space[at : at + 4] = (following << 20 | 1 << 16 | which).to_bytes(4, "little")
        space[at + 6 : at + 8] = control.to_bytes(2, "little")
    return bytes(space)


@pytest.mark.parametrize(
    ("config", "redirects"),
    [
        (pci_config((0x100, 0x0001, 0xFFFF)), False),  # error reporting, no access control
        (pci_config((0x100, 0x0001, 0), (0x148, 0x000D, 0b11101)), True),
        (pci_config((0x100, 0x000D, 0b10001)), False),  # source validation and upstream forwarding only
        (bytes(64), False),
    ],
)
def test_access_control_of_a_bridge(config: bytes, redirects: bool) -> None:
    assert gather.redirects(config) is redirects


def test_bridges_that_only_root_may_read_are_unknown(tmp_path: Path) -> None:
    bridge = tmp_path / "0000:00:01.0"
    bridge.mkdir()
    (bridge / "class").write_text("0x060400\n")
    (bridge / "config").write_bytes(bytes(64))
    assert gather.acs_bridges(tmp_path) is None
    (bridge / "config").write_bytes(pci_config((0x100, 0x000D, 0b1100)))
    assert gather.acs_bridges(tmp_path) == ("0000:00:01.0",)


def test_rdma_ports_are_read(tmp_path: Path) -> None:
    port = tmp_path / "mlx5_0" / "ports" / "1"
    port.mkdir(parents=True)
    for name, text in {"state": "4: ACTIVE", "link_layer": "InfiniBand", "rate": "400 Gb/sec (4X NDR)"}.items():
        (port / name).write_text(text + "\n")
    (found,) = gather.rdma_ports(tmp_path, ())
    assert (found.device, found.port, found.state, found.rate_gbit_s) == ("mlx5_0", 1, "ACTIVE", 400.0)


def test_this_host_can_be_looked_at() -> None:
    found: Any = gather.host()
    assert found.host
    assert found.memlock_bytes is not None
    assert "lo" in [i.name for i in found.interfaces]
