"""NCCL's own report of its communicators, which it gives on a local port (RAS, NCCL 2.24 and newer)."""

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

ADDRESS = ("localhost", 28028)
RANK = re.compile(
    r"Rank (?P<rank>\d+)(?: has launched up to operation \d+)? -- GPU (?P<gpu>\S+) managed by process (?P<pid>\d+) "
    r"on node (?P<node>\S+)"
)
PROCESS = re.compile(r"^\s*Process (?P<pid>\d+) on node (?P<node>\S+) managing GPUs? (?P<gpu>\S+)")
HEAD = re.compile(r"^(?:#\S+ \([0-9a-f]+\) +)?(?P<status>INCOMPLETE|DEAD|TIMEOUT|MISMATCH)\s*$")


@dataclass(frozen=True, slots=True)
class RasProblem:
    """One of the report's errors or warnings. `who`: ranks and processes that it names."""

    status: str
    message: str
    who: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.status}: {self.message}" + (f" ({'; '.join(self.who)})" if self.who else "")


@dataclass(frozen=True, slots=True)
class RasReport:
    """`version`: of NCCL; empty if the text is no report."""

    version: str
    problems: tuple[RasProblem, ...]


def address(environ: Mapping[str, str]) -> tuple[str, int]:
    """Where the report is given: NCCL_RAS_ADDR, or the usual port."""
    host, _, port = environ.get("NCCL_RAS_ADDR", "").rpartition(":")
    return (host, int(port)) if host and port.isdecimal() else ADDRESS


def ask(environ: Mapping[str, str] = os.environ, *, timeout_s: float = 5.0) -> RasReport | None:
    """The report of the NCCL job on this host; None where there is none, or it is an older NCCL."""
    try:
        with socket.create_connection(address(environ), timeout=timeout_s) as link:
            link.sendall(b"verbose status\n")
            link.shutdown(socket.SHUT_WR)
            chunks = []
            while chunk := link.recv(65536):
                chunks.append(chunk)
    except OSError:
        return None
    report = parse(b"".join(chunks).decode(errors="replace"))
    return report if report.version else None


def parse(text: str) -> RasReport:
    """What `ncclras -v` prints."""
    version = re.search(r"^NCCL version (\S+)", text, re.M)
    problems: list[RasProblem] = []
    status, message = "", ""
    who: list[str] = []
    for line in [*text.splitlines(), "Warnings"]:
        head = HEAD.match(line)
        if head or not line.strip() or set(line.strip()) == {"="} or line.strip() in ("Errors", "Warnings"):
            if status and (message or who):
                problems.append(RasProblem(status, message, tuple(who)))
                status, message, who = "", "", []
            if head:
                status, message, who = head["status"], "", []
            continue
        if not status:
            continue
        if match := RANK.search(line):
            who.append(f"rank {match['rank']} (pid {match['pid']} on {match['node']}, GPU {match['gpu']})")
        elif match := PROCESS.search(line):
            who.append(f"pid {match['pid']} on {match['node']}, GPU {match['gpu']}")
        else:
            message = f"{message}; {line.strip()}" if message else line.strip()
    return RasReport(version[1] if version else "", tuple(problems))
