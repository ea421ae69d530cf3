"""docs/comm.md: its table has every check, its options are the commands', and what runs on a CPU runs."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from harness import hosts
from harness.places import REPOSITORY

from kervan.cli import comm
from kervan.comm import doctor

PAGE = (REPOSITORY / "docs/comm.md").read_text()
COMMANDS = re.search(r"<!-- cpu -->\n```bash\n(.*?)```", PAGE, re.S)


def first_cells(heading: str) -> list[str]:
    """Code in the first cells of the table below a heading."""
    section = PAGE[PAGE.index(f"\n## {heading}\n") :]
    rows = re.findall(r"^\| (`[^|]*) \|", section[: section.find("\n## ", 4) if "\n## " in section[4:] else None], re.M)
    return [code for row in rows for code in re.findall(r"`([^`]+)`", row)]


def test_the_table_of_checks_is_the_doctors() -> None:
    found = doctor.examine_host(hosts.host(), hosts.measured())
    assert first_cells("Doctor") == [check.name for check in found]


def test_the_options_of_the_bench_are_described() -> None:
    real = {name for p in comm.bench.params if isinstance(p, click.Option) for name in p.opts}
    assert set(first_cells("Bench")) == real


def test_the_changelog_counts_the_checks() -> None:
    found = doctor.examine_host(hosts.host(), hosts.measured())
    assert f"kervan comm doctor`: {len(found)} checks" in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_line_of_the_page_parses() -> None:
    for line in re.findall(r"^kervan (comm (?:bench|doctor)[^\n]*)$", PAGE, re.M):
        _, name, *words = shlex.split(line, comments=True)
        command = comm.comm.commands[name]
        command.make_context(name, words)


def table(marker: str) -> tuple[dict[str, Any], list[list[str]]]:
    """The record that a table names in its marker, and the table's lines below its head."""
    match = re.search(rf"^<!-- {marker}: (\S+) -->\n((?:\|.*\n)+)", PAGE, re.M)
    assert match is not None, marker
    record = json.loads((REPOSITORY / f"benchmarks/records/{match[1]}.json").read_text())
    return record, [[cell.strip() for cell in line.strip("| \n").split("|")] for line in match[2].splitlines()[2:]]


def test_the_all_reduces_of_two_gpus_are_those_of_the_record() -> None:
    record, lines = table("all-reduce")
    rows = {(r["backend"], r["mode"], r["bytes"]): r for r in record["rows"] if r["op"] == "all_reduce"}
    assert f"{len(record['rows'])} rows" in PAGE
    assert all(row["correct"] for row in record["rows"])
    ways = (("nccl", "eager"), ("nccl", "graph"), ("symm_mem", "graph"))
    for size, *cells in lines:
        number, unit = size.split()
        num_bytes = int(number) << {"KiB": 10, "MiB": 20, "GiB": 30}[unit]
        found = [rows.get((*way, num_bytes)) for way in ways]
        assert cells == [
            "-" if row is None else f"{row[key]:.1f}" for key in ("time_us", "busbw_gb_s") for row in found
        ], size


def test_the_planted_faults_are_those_of_the_record() -> None:
    record, lines = table("faults")
    assert [(cells[0], cells[1]) for cells in lines] == [
        (
            ", ".join(f"`{name}={value}`" for name, value in row["env"].items()),
            ", ".join(f"`{check['name']}`" for check in row["failed"]),
        )
        for row in record["rows"]
    ]
    for cells, row in zip(lines, record["rows"], strict=True):
        causes = " ".join(check["cause"] for check in row["failed"])
        assert cells[2] == "-" or f"busbw of 2 GPUs {cells[2]} at 256 MiB" in causes
    assert f"passed in {record['preflight']['took_s']} s" in PAGE


@pytest.mark.parametrize("line", COMMANDS[1].splitlines() if COMMANDS else [])
def test_the_commands_for_a_cpu_run(line: str, tmp_path: Path) -> None:
    words = [sys.executable, "-m", *shlex.split(line), "--record", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(tmp_path.iterdir())
