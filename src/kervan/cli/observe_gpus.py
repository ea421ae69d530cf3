"""`kervan observe gpus`."""

import http.server
import json
import socket
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from kervan.cli import option_types, options
from kervan.errors import ConfigError, EngineError

if TYPE_CHECKING:
    from rich.table import Table

    from kervan.observe.dcgm import GpuCounters

MIN_EVERY_S = 0.2
COLUMNS = (
    "GPU_UTIL", "SM_ACTIVE", "PIPE_TENSOR_ACTIVE", "DRAM_ACTIVE", "FB_USED", "SM_CLOCK", "POWER_USAGE", "GPU_TEMP",
    "PCIE_TX", "PCIE_RX", "NVLINK_TX", "NVLINK_RX", "XID", "ECC_DBE",
)  # fmt: skip
HEADS = {"PIPE_TENSOR_ACTIVE": "TENSOR", "DRAM_ACTIVE": "DRAM", "POWER_USAGE": "POWER", "GPU_TEMP": "TEMP"}


@click.command()
@click.option("--every", "every_s", type=option_types.DURATION, default="1s", show_default=True,
              help="Interval of shares and rates; at least 0.2s.")  # fmt: skip
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C; with --json, an object a line.")
@click.option("--metrics", is_flag=True, help="Print Prometheus text, as dcgm-exporter does.")
@click.option("--listen", type=click.IntRange(1, 65535), metavar="PORT",
              help="Serve that text at /metrics of this port, on all addresses, until Ctrl-C.")  # fmt: skip
@click.option("--dcgm", metavar="URL", help="Page of a dcgm-exporter. [default: that of this host, port 9400]")
@options.as_json
def gpus(every_s: float, watch: bool, metrics: bool, listen: int | None, dcgm: str | None, as_json: bool) -> None:
    """Show what the GPUs of this machine do, under dcgm-exporter's names: use, memory, clocks, power, links, errors.

    From a dcgm-exporter where one answers, else from NVML. GPU_UTIL says only that something ran; SM_ACTIVE, TENSOR and
    DRAM, which Hopper and newer GPUs have, say how busy it was (docs/gpus.md).
    """
    if every_s < MIN_EVERY_S:
        raise ConfigError(f"--every {every_s:g} s is below {MIN_EVERY_S:g} s; write for example --every 1s")
    if as_json and metrics:
        raise ConfigError("--json and --metrics are two forms of the same; give one of them")
    if listen is not None and (as_json or watch or metrics):
        raise ConfigError("--listen prints nothing; leave out --json, --watch and --metrics")
    from kervan.observe import dcgm as pages
    from kervan.observe import gpu_counters

    url = pages.URL if dcgm is None else pages.page_url(dcgm, "--dcgm")
    if dcgm is not None and pages.fetch(url) is None:
        raise EngineError(f"no dcgm-exporter with GPUs answers at {dcgm}; leave --dcgm out to ask NVML")
    if pages.fetch(url) is not None:
        _show(lambda over_s: _again(url, over_s), "dcgm-exporter", every_s, watch, metrics, listen, as_json)
        return
    with gpu_counters.opened() as reader:
        if reader is None:
            raise EngineError(
                "no GPU can be read here: NVML's package, its library or a GPU is missing; pip install nvidia-ml-py, "
                "and see kervan doctor"
            )
        _show(reader.read, "NVML", every_s, watch, metrics, listen, as_json)


def _again(url: str, over_s: float) -> "tuple[GpuCounters, ...]":
    from kervan.observe.dcgm import fetch

    if over_s:
        time.sleep(over_s)
    found = fetch(url)
    if found is None:
        raise EngineError(f"the dcgm-exporter at {url} does not answer any more")
    return found


def _show(
    read: Callable[[float], "tuple[GpuCounters, ...]"],
    source: str,
    every_s: float,
    watch: bool,
    metrics: bool,
    listen: int | None,
    as_json: bool,
) -> None:
    from kervan.observe import dcgm as pages

    if listen is not None:
        _serve(listen, lambda: pages.page(read(0.0), socket.gethostname()))
        return
    first_s = 0.0 if source == "dcgm-exporter" else every_s
    if watch and not as_json and not metrics and sys.stdout.isatty():
        from rich.live import Live

        with Live(screen=True, auto_refresh=False) as live:
            while True:
                live.update(table(read(every_s)), refresh=True)
    while True:
        found = read(first_s)
        first_s = every_s
        if metrics:
            print(pages.page(found, socket.gethostname()), end="", flush=True)
        elif as_json:
            print(json.dumps(to_dict(found, source), indent=None if watch else 2), flush=True)
        else:
            from rich.console import Console

            Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(table(found))
        if not watch:
            return


def to_dict(found: "tuple[GpuCounters, ...]", source: str) -> dict[str, Any]:
    """What `--json` prints."""
    rows = [{"gpu": g.index, "uuid": g.uuid, "name": g.name, "values": g.values, "throttle": g.throttle} for g in found]
    return {"time_s": time.time(), "source": source, "gpus": rows}


def table(found: "tuple[GpuCounters, ...]") -> "Table":
    """A row a GPU; what none of them has gets no column."""
    from rich.table import Table

    from kervan.observe import dcgm as pages

    by_short = {counter.short: counter for counter in pages.COUNTERS}
    shown = [by_short[short] for short in COLUMNS if any(by_short[short].name in gpu.values for gpu in found)]
    made = Table("GPU", "name", box=None, pad_edge=False, header_style="dim")
    for counter in shown:
        made.add_column(HEADS.get(counter.short, counter.short), justify="right")
    made.add_column("held down by")
    for gpu in found:
        cells = [_cell(counter.unit, gpu.values.get(counter.name), counter.name) for counter in shown]
        held = ", ".join(gpu.throttle) if gpu.throttle is not None else "-"
        made.add_row(str(gpu.index), gpu.name, *cells, held)
    return made


def _cell(unit: str, value: float | None, name: str) -> str:
    if value is None:
        return "-"
    if name.startswith("DCGM_FI_PROF_") and not unit:
        return f"{value:.0%}"
    if unit == "B/s":
        return f"{value / 1e9:.1f} GB/s"
    if unit == "MiB":
        return f"{value / 1024:.1f} GiB"
    return f"{value:,.0f}{' ' if unit not in ('', '%') else ''}{unit}"


def _serve(port: int, page: Callable[[], str]) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "only /metrics is here")
                return
            body = page().encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Says nothing: Prometheus comes every few seconds."""

    try:
        server = http.server.HTTPServer(("", port), Handler)
    except OSError as error:
        raise ConfigError(f"port {port} cannot be used ({error.strerror}); choose another --listen") from error
    print(
        f"GPU counters at http://{socket.gethostname()}:{server.server_address[1]}/metrics; Ctrl-C stops it", flush=True
    )
    with server:
        server.serve_forever()
