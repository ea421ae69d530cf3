"""The tables of docs/hardware.md are those of the code. `python tests/docs/test_hardware_page.py` writes them."""

import re
from collections.abc import Callable, Iterator

import pytest
from harness.places import DOCS

from kervan.facts import prices
from kervan.facts.hardware import GPUS, Gpu
from kervan.facts.hardware_sources import ITSELF, SOURCES
from kervan.facts.instances import INSTANCES

PAGE = DOCS / "hardware.md"


def number(value: float, unit: float) -> str:
    return f"{value / unit:g}" if value else "-"


def link(gpu: Gpu) -> str:
    what = gpu.link.kind if gpu.link.kind != "pcie" else "none" if gpu.link.has_peer_to_peer else "none, no peer access"
    if gpu.link.kind == "pcie":
        return what
    words = {"nvlink": "NVLink", "nvlink-bridge": "NVLink bridge", "infinity-fabric": "Infinity Fabric"}
    return f"{words[what]} {gpu.link.generation}: {number(gpu.link.bytes_s, 1e9)} x{gpu.link.max_gpus}"


def page(title: str, url: str) -> str:
    return f"[{title}]({url})" if url else title


def gpu_rows() -> Iterator[list[str]]:
    for gpu in GPUS.values():
        rates = (number(value, 1e12) for value in (gpu.bf16_flops, gpu.fp8_flops, gpu.fp4_flops))
        yield [
            gpu.name,
            str(gpu.memory_mib),
            f"{gpu.memory_gib:.2f}",
            number(gpu.bandwidth_bytes_s, 1e12),
            *rates,
            link(gpu),
            number(gpu.pcie_bytes_s, 1e9),
            gpu.compute_capability,
        ]


def source_rows() -> Iterator[list[str]]:
    for key, source in SOURCES.items():
        checked = "read" if source.checked == ITSELF else page("here", source.checked) if source.checked else "no"
        if source.title.startswith("derived"):
            checked = "derived"
        yield [key, page(source.title, source.url), checked]


def instance_rows() -> Iterator[list[str]]:
    for row in INSTANCES.values():
        gbit_s = page(f"{row.network_gbit_s:g}", row.source)
        yield [row.provider, row.name, f"{row.num_gpus}x {row.gpu}", gbit_s, "yes" if row.is_checked else "no"]


def price_rows() -> Iterator[list[str]]:
    for row in sorted(prices.load(), key=lambda row: (list(GPUS).index(row.gpu), row.market, row.usd_per_gpu_h)):
        usd = f"{row.usd_per_gpu_h:.2f}"
        usd = f"**{usd}**" if row == prices.lookup(row.gpu, row.market) else usd
        where = page("page", row.source)
        yield [row.gpu, row.market, usd, row.provider, row.instance, row.date.isoformat(), where, row.note]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "gpus": gpu_rows,
    "sources": source_rows,
    "instances": instance_rows,
    "prices": price_rows,
}


def table(name: str) -> str:
    return "".join("| " + " | ".join(row) + " |\n" for row in TABLES[name]())


def marked(name: str) -> re.Pattern[str]:
    """Group 1: head and rule; group 2: the rows."""
    return re.compile(rf"(<!-- {name} -->\n\|.*\n\|[-|]+\n)((?:\|.*\n)*)(?=<!-- end -->)")


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_tables_of_the_code(name: str) -> None:
    found = marked(name).search(PAGE.read_text())
    assert found is not None
    assert found[2] == table(name), "python tests/docs/test_hardware_page.py writes the tables"
    columns = found[1].splitlines()[1].count("|")
    assert {line.count("|") for line in found[2].splitlines()} == {columns}


if __name__ == "__main__":
    text = PAGE.read_text()
    for name in TABLES:
        text = marked(name).sub(lambda match: match[1] + table(name), text)  # noqa: B023
    PAGE.write_text(text)
