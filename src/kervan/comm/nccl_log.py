"""What NCCL's log (NCCL_DEBUG=INFO) says: the transport of each connection, warnings, and its own diagnostics."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

CHANNEL = re.compile(r"Channel \d+(?:/\d+)? ?: (?P<a>\d+)\[\w+\] -> (?P<b>\d+)\[\w+\].* via (?P<transport>\S+)")
WARN = re.compile(r"NCCL WARN (?P<text>.+)$")
VERSION = re.compile(r"NCCL version (?P<version>[\d.]+)")
DIAG = re.compile(r"NCCL DIAG (?P<text>.+)$")


@dataclass(frozen=True, slots=True)
class NcclLog:
    """`transports`: P2P/CUMEM, SHM/direct, NET/IB, NET/Socket ... by how many connections of this log use each.

    `nvls`: whether NVLink multicast is there; None if the log does not say. `diagnostics`: lines of NCCL 2.31 or newer
    with their tag; None if there was no such report.
    """

    version: str
    transports: dict[str, int]
    warnings: tuple[str, ...]
    nvls: bool | None
    diagnostics: tuple[str, ...] | None


def parse(texts: Iterable[str]) -> NcclLog:
    """The logs of all ranks together."""
    version, nvls = "", None
    transports: Counter[str] = Counter()
    warnings: dict[str, None] = {}
    diagnostics: list[str] = []
    for text in texts:
        for line in text.splitlines():
            if match := CHANNEL.search(line):
                parts = match["transport"].split("/")
                transports["/".join(parts[:2])] += 1
            elif match := WARN.search(line):
                warnings[match["text"].strip()[:300]] = None
            elif match := DIAG.search(line):
                diagnostics.append(match["text"].strip())
            elif match := VERSION.search(line):
                version = match["version"]
            elif "NVLS multicast support is" in line:
                nvls = "not available" not in line
    return NcclLog(version, dict(transports), tuple(warnings), nvls, tuple(diagnostics) or None)


def failed_diagnostics(lines: Iterable[str]) -> list[str]:
    """The lines that ask for a look: any tag but [OK]."""
    return [line for line in lines if re.match(r"\[(?!OK\])\w+\]", line)]
