"""A machine's GPUs as `nvidia-smi` prints them."""

import csv
import re
import subprocess
from collections.abc import Mapping

from kervan.errors import ConfigError
from kervan.observe.reading import GpuDevice, Pair, Reading

FIELDS = (
    "index", "uuid", "name", "memory.total", "driver_version", "mig.mode.current", "pcie.link.gen.max",
    "pcie.link.width.max",
)  # fmt: skip
QUERY = (f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader")
TIMEOUT_S = 60.0
ANSI = re.compile(r"\x1b\[[0-9;]*m")  # `topo` underlines its head, even into a pipe


def read() -> Reading | None:
    """None if there is no nvidia-smi, or no GPU.

    Raises: ConfigError if nvidia-smi fails for another reason.
    """
    try:
        code, text = _run(*QUERY)
    except FileNotFoundError:
        return None
    if "No devices were found" in text:
        return None
    if code != 0:
        raise ConfigError(
            f"nvidia-smi failed ({code}): {' '.join(text.split())[:300]}; mend the driver, or name the GPU, "
            "for example --gpu H200"
        )
    driver, devices = parse_query(text)
    if not devices:
        return None
    connections: Mapping[Pair, str] = {}
    peers: Mapping[Pair, bool] = {}
    if len(devices) > 1:  # what fails here is not known of some machines, such as virtual ones
        code, text = _run("topo", "-m")
        connections = parse_matrix(text) if code == 0 else {}
        code, text = _run("topo", "-p2p", "r")
        peers = {pair: word == "OK" for pair, word in parse_matrix(text).items()} if code == 0 else {}
    return Reading("nvidia-smi", driver, devices, connections, peers)


def parse_query(text: str) -> tuple[str, tuple[GpuDevice, ...]]:
    """Driver and GPUs of `nvidia-smi --query-gpu=...` with `FIELDS` as CSV without a head.

    Raises: ConfigError for a line that does not have these fields.
    """
    driver, devices = "", []
    for cells in csv.reader(text.splitlines(), skipinitialspace=True):
        if not cells:
            continue
        row = dict(zip(FIELDS, (cell.strip() for cell in cells), strict=False))
        memory = re.fullmatch(r"(\d+) MiB", row.get("memory.total", ""))
        if len(cells) != len(FIELDS) or not row["index"].isdigit() or memory is None:
            raise ConfigError(
                f"nvidia-smi answered {', '.join(cells)!r}, which is not {', '.join(FIELDS)}; name the GPU, "
                "for example --gpu H200"
            )
        driver = row["driver_version"]
        devices.append(
            GpuDevice(
                index=int(row["index"]),
                uuid=row["uuid"],
                name=row["name"],
                memory_mib=int(memory[1]),
                has_mig=row["mig.mode.current"] == "Enabled",
                pcie_generation=_number(row["pcie.link.gen.max"]),
                pcie_lanes=_number(row["pcie.link.width.max"]),
            )
        )
    return driver, tuple(devices)


def parse_matrix(text: str) -> dict[Pair, str]:
    """The entries between the GPUs in the table of `nvidia-smi topo`; columns of network cards are left out."""
    lines = [ANSI.sub("", line).split() for line in text.splitlines()]
    head = next((cells for cells in lines if cells[:1] == ["GPU0"] and cells[1:2] != ["X"]), [])
    paths = {}
    for cells in lines:
        name = re.fullmatch(r"GPU(\d+)", cells[0]) if cells else None
        if name is None or cells is head:
            continue
        for column, entry in zip(head, cells[1:], strict=False):
            other = re.fullmatch(r"GPU(\d+)", column)
            if other is not None and entry != "X":
                paths[int(name[1]), int(other[1])] = entry
    return paths


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # "[N/A]" where there is no PCIe link


def _run(*arguments: str) -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except PermissionError as error:
        raise ConfigError("nvidia-smi may not be run here; name the GPU, for example --gpu H200") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"nvidia-smi did not answer within {TIMEOUT_S:g} s; mend the driver, or name the GPU, "
            "for example --gpu H200"
        ) from error
    return done.returncode, done.stdout or done.stderr
