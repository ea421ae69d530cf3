"""This machine's GPUs: what nvidia-smi prints, what NVML answers, and what follows from it."""
# ruff: noqa: N802  (names of NVML)

import dataclasses
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import places

from kervan.errors import ConfigError
from kervan.facts import hardware
from kervan.facts.hardware import GpuLink
from kervan.facts.hardware_sources import SOURCES
from kervan.observe import machine, nvidia_smi, nvml
from kervan.observe.reading import GpuDevice, Reading

DATA = places.DATA / "nvidia_smi"
MACHINES = sorted(path.name for path in DATA.iterdir() if path.is_dir())


def recorded(name: str) -> Reading:
    driver, devices = nvidia_smi.parse_query((DATA / name / "query.csv").read_text())
    topo, p2p = DATA / name / "topo.txt", DATA / name / "p2p.txt"
    if not topo.exists():
        return Reading("nvidia-smi", driver, devices)
    peers = {pair: word == "OK" for pair, word in nvidia_smi.parse_matrix(p2p.read_text()).items()}
    return Reading("nvidia-smi", driver, devices, nvidia_smi.parse_matrix(topo.read_text()), peers)


@pytest.mark.parametrize(
    ("name", "row", "num_gpus", "memory_mib", "link", "connection"),
    [
        ("8xh200", "H200", 8, 143771, GpuLink("nvlink", 4, 450e9, 8), "NV18"),
        # Two of a switched eight: the switch gives the pair all 18 links.
        ("2xh100", "H100", 2, 81559, GpuLink("nvlink", 4, 450e9, 2), "NV18"),
        ("4xh100nvl", "H100-NVL", 4, 95830, GpuLink("nvlink-bridge", 4, 300e9, 2), "SYS"),
        ("4xl40s", "L40S", 4, 46068, GpuLink("pcie", 4, 32e9, 4, has_peer_to_peer=True), "SYS"),
        # Eight lanes each, as on a desktop's board, and a driver without peer access.
        ("2xrtx4090", "RTX4090", 2, 24564, GpuLink("pcie", 4, 16e9, 2, has_peer_to_peer=False), "PHB"),
        ("1xa10g", "A10G", 1, 23028, hardware.gpu("A10G").link, ""),
    ],
)
def test_machines_are_rows_of_the_table(
    name: str, row: str, num_gpus: int, memory_mib: int, link: GpuLink, connection: str
) -> None:
    found = machine.machine(recorded(name))
    assert (found.gpu.name, found.num_gpus, found.gpu.memory_mib) == (row, num_gpus, memory_mib)
    assert (found.gpu.link, found.connection) == (link, connection)
    assert found.gpu.memory_gib == pytest.approx(hardware.gpu(row).memory_gib)
    assert found.gpu.bf16_flops == hardware.gpu(row).bf16_flops
    assert {SOURCES[key].title for key in found.gpu.sources.values()}
    assert found.gpu.sources["link"] == ("machine" if connection else hardware.gpu(row).sources["link"])


def test_all_samples_are_used() -> None:
    assert MACHINES == ["1xa10g", "2xh100", "2xrtx4090", "4xh100nvl", "4xl40s", "8xh200"]


def test_a_machine_describes_itself() -> None:
    assert str(machine.machine(recorded("8xh200"))) == "8x H200 with 143771 MiB, NV18, driver 580.159.04"
    assert str(machine.machine(recorded("1xa10g"))) == "1x A10G with 23028 MiB, driver 570.133.20"


def devices(*names: str, **more: Any) -> tuple[GpuDevice, ...]:
    return tuple(GpuDevice(index, f"GPU-{index}aaa", name, 81559, **more) for index, name in enumerate(names))


def reading(*names: str, words: str = "", **more: Any) -> Reading:
    """Equal words between all GPUs, or the upper triangle of the matrix, row by row."""
    indices = range(len(names))
    pairs = [(a, b) for a in indices for b in indices if a < b]
    given = words.split() if " " in words else [words] * len(pairs)
    connections = {pair: word for pair, word in zip(pairs, given, strict=True) if word}
    connections |= {(b, a): word for (a, b), word in connections.items()}
    return Reading("nvidia-smi", "580", devices(*names, **more), connections)


H100 = "NVIDIA H100 80GB HBM3"
A100 = "NVIDIA A100-SXM4-80GB"
V100 = "Tesla V100-SXM2-16GB"


@pytest.mark.parametrize(
    ("found", "link", "connection"),
    [
        # Without a switch, the 12 links of an A100 are shared out among three others.
        pytest.param(reading(*[A100] * 4, words="NV4"), GpuLink("nvlink", 3, 300e9, 4), "NV4", id="mesh of four"),
        pytest.param(reading(*[A100] * 8, words="NV12"), GpuLink("nvlink", 3, 300e9, 8), "NV12", id="switch"),
        pytest.param(reading(*[A100] * 2, words="NV4"), GpuLink("nvlink", 3, 100e9, 2), "NV4", id="part of a mesh"),
        pytest.param(
            reading(*[V100] * 2, words="NV2"), GpuLink("nvlink", 2, 50e9, 2), "NV2", id="a pair of a cube mesh"
        ),
        pytest.param(
            # 0-1-2 in a line: only pairs have links between all their members.
            reading(*[A100] * 3, words="NV4 SYS NV4"),
            GpuLink("nvlink", 3, 100e9, 2),
            "SYS",
            id="a line",
        ),
        pytest.param(
            reading(*[A100] * 3, words="NV12 NODE PHB"), GpuLink("pcie", 0, 32e9, 3), "NODE", id="one without links"
        ),
        pytest.param(reading(*[H100] * 2), hardware.gpu("H100").link, "", id="not known"),
        pytest.param(reading(*[H100] * 2, words="N/A"), hardware.gpu("H100").link, "", id="an unknown word"),
    ],
)
def test_links_follow_from_the_topology(found: Reading, link: GpuLink, connection: str) -> None:
    result = machine.machine(found)
    assert (result.gpu.link, result.connection) == (link, connection)


def test_less_memory_than_the_row_is_less_for_software_too() -> None:
    full = recorded("2xh100")
    small = dataclasses.replace(full, devices=(full.devices[0], dataclasses.replace(full.devices[1], memory_mib=80535)))
    assert machine.machine(small).gpu.memory_mib == 80535
    assert machine.machine(small).gpu.memory_gib == pytest.approx(hardware.gpu("H100").memory_gib - 1)


@pytest.mark.parametrize(
    ("visible", "num_gpus"),
    [(None, 8), ("0", 1), ("3,1", 2), (" 0 , 1 ", 2), ("0,1,9,2", 2), ("0,0", 1), ("GPU-00000002,GPU-00000005", 2)],
)
def test_hidden_gpus_do_not_count(visible: str | None, num_gpus: int) -> None:
    assert machine.machine(recorded("8xh200"), visible).num_gpus == num_gpus


def test_hidden_gpus_may_differ() -> None:
    assert machine.machine(reading("Tesla T4", H100), "1").gpu.name == "H100"


@pytest.mark.parametrize(
    ("found", "visible", "message"),
    [
        pytest.param(
            reading(H100, "NVIDIA L4", "NVIDIA L4"),
            None,
            "this machine has 1x NVIDIA H100 80GB HBM3 and 2x NVIDIA L4, and a plan is for GPUs of one kind; hide",
            id="mixed",
        ),
        pytest.param(
            reading("Tesla P4"),
            None,
            "this machine's 'Tesla P4' is not in the table of GPUs; name the one",
            id="unknown",
        ),
        pytest.param(
            reading("NVIDIA H200 NVL"), None, "'NVIDIA H200 NVL' is not in the table of GPUs", id="near is not the same"
        ),
        pytest.param(
            reading(H100, has_mig=True),
            None,
            r"GPU 0 \(NVIDIA H100 80GB HBM3\) has MIG on, and a plan is for whole GPUs; turn MIG off "
            r"\(nvidia-smi -i 0 -mig 0\), or name the GPU with --gpu H100",
            id="mig",
        ),
        pytest.param(reading(H100), "MIG-1234", "names a part of a GPU, and a plan is for whole GPUs", id="mig uuid"),
        pytest.param(reading(H100, H100), "", "CUDA_VISIBLE_DEVICES='' hides all 2 GPUs", id="all hidden"),
        pytest.param(reading(H100, H100), "-1", "CUDA_VISIBLE_DEVICES='-1' hides all 2 GPUs", id="-1"),
        pytest.param(reading(H100, H100), "GPU-", "CUDA_VISIBLE_DEVICES='GPU-' hides all 2 GPUs", id="ambiguous"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(found: Reading, visible: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        machine.machine(found, visible)


# ---- nvidia-smi


@pytest.fixture
def nvidia_smi_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a program of this name first in PATH; without one, there is none at all."""

    def install(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(nvml, "read", lambda: None)
    return install


@pytest.mark.parametrize("name", MACHINES)
def test_the_program_is_asked(nvidia_smi_that: Any, name: str) -> None:
    """A program that prints the recorded answers, to the questions that kervan asks."""
    folder = DATA / name
    nvidia_smi_that(
        f"""case "$*" in
--query-gpu=*) exec /bin/cat {folder}/query.csv ;;
"topo -m") exec /bin/cat {folder}/topo.txt ;;
"topo -p2p r") exec /bin/cat {folder}/p2p.txt ;;
esac
echo "what is $*?" >&2; exit 2"""
    )
    assert nvidia_smi.read() == recorded(name)
    assert machine.read({}) == machine.machine(recorded(name))


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param("", "no NVIDIA GPU is visible", id="says nothing"),
        pytest.param(
            "echo No devices were found; exit 6", "no NVIDIA GPU is visible on this machine; name", id="no GPU"
        ),
        pytest.param(
            "echo NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.; exit 9",
            r"nvidia-smi failed \(9\): NVIDIA-SMI has failed because .* driver\.; mend the driver, or name the GPU",
            id="no driver",
        ),
        pytest.param("echo 0, GPU-1, NVIDIA H100", "nvidia-smi answered '0, GPU-1, NVIDIA H100', which", id="short"),
        pytest.param(
            "echo '0, GPU-1, NVIDIA GB10, [N/A], 580, [N/A], 1, 1'", r"answered '0, GPU-1, NVIDIA GB10", id="no memory"
        ),
    ],
)
def test_what_the_program_says_instead(nvidia_smi_that: Any, script: str, message: str) -> None:
    nvidia_smi_that(script)
    with pytest.raises(ConfigError, match=message):
        machine.read({})


def test_a_program_that_hangs_is_given_up(nvidia_smi_that: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvidia_smi, "TIMEOUT_S", 0.2)
    nvidia_smi_that("exec /bin/sleep 30")
    with pytest.raises(ConfigError, match=r"nvidia-smi did not answer within 0\.2 s"):
        machine.read({})


def test_a_program_that_may_not_be_run(nvidia_smi_that: Any, tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").mkdir()  # nobody may execute a directory, not even root
    with pytest.raises(ConfigError, match="nvidia-smi may not be run here; name the GPU"):
        machine.read({})


def test_no_gpu_without_the_program(nvidia_smi_that: Any) -> None:
    assert nvidia_smi_that is not None
    with pytest.raises(ConfigError, match="no NVIDIA GPU is visible on this machine; name one with --gpu, for example"):
        machine.read({})


def test_topology_that_fails_is_not_known(nvidia_smi_that: Any) -> None:
    nvidia_smi_that(f'[ "$1" = topo ] && exit 3; exec /bin/cat {DATA}/2xh100/query.csv')
    found = machine.read({})
    assert (found.num_gpus, found.connection, found.gpu.link) == (2, "", hardware.gpu("H100").link)


# ---- NVML


class NvmlError(Exception):
    pass


class FakeNvml:
    """The functions of `pynvml` that are asked, over GPUs whose links end at a switch, at each other, or nowhere."""

    NVMLError = NvmlError
    NVML_NVLINK_MAX_LINKS = 18
    NVML_FEATURE_ENABLED = 1
    NVML_DEVICE_MIG_ENABLE = 1
    NVML_P2P_STATUS_OK = 0
    NVML_P2P_CAPS_INDEX_READ = (0,)  # as in some versions of the package
    NVML_TOPOLOGY_SINGLE, NVML_TOPOLOGY_MULTIPLE, NVML_TOPOLOGY_HOSTBRIDGE = 10, 20, 30
    NVML_TOPOLOGY_NODE, NVML_TOPOLOGY_SYSTEM = 40, 50

    def __init__(
        self, name: str | bytes, ends: list[list[str]], *, mig: bool = False, hides_ends: bool = False
    ) -> None:
        self.name, self.ends, self.mig, self.hides_ends = name, ends, mig, hides_ends

    def nvmlDeviceGetCount(self) -> int:
        return len(self.ends)

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.159.04"

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetName(self, _: int) -> str | bytes:
        return self.name

    def nvmlDeviceGetMemoryInfo(self, _: int) -> Any:
        return SimpleNamespace(total=85520809984)

    def nvmlDeviceGetMigMode(self, _: int) -> list[int]:
        return [int(self.mig), int(self.mig)]

    def nvmlDeviceGetMaxPcieLinkGeneration(self, _: int) -> int:
        return 5

    def nvmlDeviceGetMaxPcieLinkWidth(self, _: int) -> int:
        raise NvmlError("not supported")

    def nvmlDeviceGetPciInfo(self, handle: int) -> Any:
        return SimpleNamespace(busId=f"bus{handle}")

    def nvmlDeviceGetP2PStatus(self, a: int, b: int, index: int) -> int:
        if not isinstance(index, int):
            raise TypeError("Don't know how to convert parameter 3")
        by_nvlink = "switch" in self.ends[a] or f"bus{b}" in self.ends[a]
        return 0 if index == 0 or by_nvlink else 3

    def nvmlDeviceGetTopologyCommonAncestor(self, a: int, b: int) -> int:
        return self.NVML_TOPOLOGY_NODE if a // 2 == b // 2 else self.NVML_TOPOLOGY_SYSTEM

    def nvmlDeviceGetNvLinkState(self, handle: int, link: int) -> int:
        if link >= len(self.ends[handle]):
            raise NvmlError("no such link")
        return 1

    def nvmlDeviceGetNvLinkRemotePciInfo(self, handle: int, link: int) -> Any:
        if self.hides_ends:
            return SimpleNamespace(busId="FFFFFFFF:FF:FF.0")  # what 2x H100 of a switched eight answered
        return SimpleNamespace(busId=self.ends[handle][link].encode())


@pytest.mark.parametrize(
    ("fake", "connections"),
    [
        pytest.param(FakeNvml(H100, [["switch"] * 18] * 2), {(0, 1): "NV18", (1, 0): "NV18"}, id="switch"),
        pytest.param(
            FakeNvml(H100, [["switch"] * 18] * 2, hides_ends=True), {(0, 1): "NV18", (1, 0): "NV18"}, id="hidden switch"
        ),
        pytest.param(
            FakeNvml(A100, [["bus1"] * 4 + ["bus2"] * 8, ["bus0"] * 4, ["bus0"] * 8]),
            {(0, 1): "NV4", (1, 0): "NV4", (0, 2): "NV8", (2, 0): "NV8", (1, 2): "SYS", (2, 1): "SYS"},
            id="mesh",
        ),
        pytest.param(FakeNvml(b"NVIDIA L40S", [[], []]), {(0, 1): "NODE", (1, 0): "NODE"}, id="no links, bytes"),
    ],
)
def test_nvml_is_read_as_nvidia_smi(fake: FakeNvml, connections: dict[tuple[int, int], str]) -> None:
    found = nvml.read_with(fake)
    assert found is not None
    assert (found.reader, found.driver, found.connections) == ("NVML", "580.159.04", connections)
    assert found.peers == dict.fromkeys(connections, True)
    name = fake.name.decode() if isinstance(fake.name, bytes) else fake.name
    assert found.devices[0] == GpuDevice(0, "GPU-0", name, 81559, has_mig=False, pcie_generation=5, pcie_lanes=0)


def test_nvml_tells_mig_and_no_gpu() -> None:
    found = nvml.read_with(FakeNvml(H100, [[]], mig=True))
    assert found is not None and found.devices[0].has_mig
    assert nvml.read_with(FakeNvml(H100, [])) is None
