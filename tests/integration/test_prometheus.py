"""A real Prometheus looks at fleets of twins while they work, drain, move and scale: no panel is dead, no name is made up."""

import asyncio
import functools
import http.server
import os
import re
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from harness.live import START_S, Fleet, eventually, eventually_async
from harness.places import DOCS
from harness.prometheus import Running, promtool, running
from harness.shared_fleet import Models
from harness.twin_load import kervan, load, streams_of

from kervan import metrics
from kervan.cli import outputs
from kervan.observe.render import queries, rules
from kervan.observe.render.dashboards import DASHBOARDS, GPU_DASHBOARD
from kervan.observe.render.files import for_prometheus

INTERVAL_S = 1
# A fleet on one machine gets no notice: of these, series are there and their quantiles are not yet numbers.
NEED_A_NOTICE = {"Notice to empty"}
WINDOW = "10s"


def often(config: Path) -> None:
    """Scrape each second, so that a test need not wait."""
    content = yaml.safe_load(config.read_text())
    content["global"] = dict.fromkeys(("scrape_interval", "evaluation_interval"), f"{INTERVAL_S}s")
    config.write_text(yaml.safe_dump(content))


def without_data(server: Running, begin_s: float, boards: list[str]) -> list[str]:
    """Title and query of each line of these dashboards that has no value since `begin_s`."""
    found = []
    for board in DASHBOARDS:
        for panel in board.panels if board.uid in boards else ():
            for query in panel.queries:
                asked = queries.for_fleet(query.expr, WINDOW)
                series = server.api.query_range(asked, begin_s, time.time(), INTERVAL_S)
                if not any(one.points or panel.title in NEED_A_NOTICE for one in series):
                    found.append(f"{board.title} / {panel.title}: {asked}")
    return found


async def test_no_panel_is_dead_while_a_fleet_works_drains_moves_and_scales(
    twins: Fleet, models: Models, tmp_path: Path
) -> None:
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)
    render, prometheus, plot = documented()
    told = await kervan(twins, *render)  # in the scratch directory, as all commands of tests
    directory = twins.home.scratch / render[-1]
    assert prometheus == [f"--config.file={render[-1]}/prometheus.yml"]
    assert f"targets: 127.0.0.1:{twins.port}" in told
    often(directory / "prometheus.yml")
    assert promtool("check", "config", "prometheus.yml", cwd=directory).returncode == 0
    begin_s, boards = time.time(), ["kervan-fleet", "kervan-replica", "kervan-gateway"]
    with running(directory / "prometheus.yml", tmp_path / "data") as server:
        async with load(twins, models):
            await kervan(twins, "scale", "4")
            pids = {entry["id"]: entry["pid"] for entry in twins.status()["replicas"] if entry["state"] == "ready"}
            await eventually_async(lambda: min(streams_of(twins).values()) > 0, "all have streams", START_S)
            lost, drained, *_ = (name for name in streams_of(twins) if name in pids)
            os.kill(pids[lost], signal.SIGKILL)
            await kervan(twins, "drain", drained, "--deadline", "2s")
            await kervan(twins, "scale", "3..4")
            await eventually_async(
                functools.partial(twins.total, "kervan_autoscaling_number"), "a decision has numbers", START_S
            )
            page = twins.get("/metrics").text
            await asyncio.to_thread(check_names, page)
            await eventually_async(lambda: not without_data(server, begin_s, boards), "every line has data", 60.0, 2.0)
        await kervan(twins, "scale", "3")
        # What the test did to the fleet is what is drawn of it.
        for expr, least in (
            ('sum(kervan_streams_moved_total{reason="lost"})', 1),
            ('sum(kervan_streams_moved_total{reason="drained"})', 1),
            ('max(kervan_drains_total{pool="on-demand"})', 1),
            ('max(kervan_autoscaling_decisions_total{direction="up"})', 1),
            ("sum(kervan_stream_move_pause_seconds_count)", 1),
            ("sum(kervan_move_recomputed_tokens_total)", 5),
            ('sum(kervan_streams_ended_total{outcome=~"good|slow"})', 16),
            ("sum(kervan_replica_generated_tokens_total)", 160),
            ("max(kervan_cost_usd_per_hour)", 1),
        ):
            (found,) = server.api.query(f"max_over_time({expr.join(('(', ')'))}[5m:1s])")
            assert found.points[0][1] >= least, expr
        assert server.api.query("sum(kervan_streams_broken_total)")[0].points[0][1] == 0
        recorded = {one.labels["__name__"] for one in server.api.query('{__name__=~"fleet:.*"}')}
        assert recorded == {one.record for one in rules.RECORDINGS}
        alerted = server.api.query('max_over_time(ALERTS{alertstate="firing",severity="critical"}[5m])')
        assert [one.labels for one in alerted] == []
        await asyncio.to_thread(draws, twins, [server.api.url if "9090" in word else word for word in plot])
    # And from what it has stored, when it has ended.
    out = str(tmp_path / "fleet.svg")
    period = f"{time.time() - begin_s:.0f}s"
    await asyncio.to_thread(draws, twins, ["observe", "plot", str(server.data), "--out", out, "--for", period])
    await asyncio.to_thread(twins.wait_until_whole, 3, 1)


def documented() -> list[list[str]]:
    """The words of the three commands of docs/monitoring.md, after their program."""
    (block,) = re.findall(r"<!-- monitoring -->\n```bash\n(.*?)```", (DOCS / "monitoring.md").read_text(), re.S)
    return [shlex.split(line)[1:] for line in block.splitlines()]


def draws(twins: Fleet, words: list[str]) -> None:
    done = twins.home.kervan(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"; without data: {', '.join(NEED_A_NOTICE)}\n")
    assert (twins.home.scratch / words[words.index("--out") + 1]).read_text().count("<polyline") > 50


def check_names(page: str) -> None:
    """A live fleet exports what the code lists, each with its help and kind, and nothing else."""
    lines = page.splitlines()
    help_of = {line.split()[2]: line.split(None, 3)[3] for line in lines if line.startswith("# HELP kervan_")}
    kind_of = {line.split()[2]: line.split()[3] for line in lines if line.startswith("# TYPE kervan_")}
    told = {name: metric for name, metric in metrics.ALL.items() if metric is not metrics.NOTICES}  # there were none
    assert help_of == {name: metric.help for name, metric in told.items()}
    assert kind_of == {name: metric.kind for name, metric in told.items()}
    sampled = {line.partition("{")[0] for line in lines if line.startswith("kervan_")}
    assert {f"{name}_bucket" if metric.kind == "histogram" else name for name, metric in told.items()} <= sampled
    assert all('fleet="twins"' in line for line in lines if line and not line.startswith("#"))


FIELDS = {
    "DCGM_FI_PROF_SM_ACTIVE": 0.62, "DCGM_FI_PROF_PIPE_TENSOR_ACTIVE": 0.2, "DCGM_FI_PROF_DRAM_ACTIVE": 0.7,
    "DCGM_FI_DEV_GPU_UTIL": 98, "DCGM_FI_DEV_FB_USED": 120000, "DCGM_FI_DEV_SM_CLOCK": 1980,
    "DCGM_FI_PROF_NVLINK_TX_BYTES": 2e9, "DCGM_FI_PROF_NVLINK_RX_BYTES": 2e9, "DCGM_FI_PROF_PCIE_TX_BYTES": 1e8,
    "DCGM_FI_PROF_PCIE_RX_BYTES": 1e8, "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": 0, "DCGM_FI_DEV_GPU_TEMP": 55,
    "DCGM_FI_DEV_POWER_USAGE": 480, "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": 4, "DCGM_FI_DEV_XID_ERRORS": 0,
    "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": 0, "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": 0,
}  # fmt: skip


class _Exporter(http.server.BaseHTTPRequestHandler):
    """Answers as dcgm-exporter 4.5 does, for two GPUs."""

    def do_GET(self) -> None:
        lines = [
            f'{field}{{gpu="{gpu}",UUID="GPU-{gpu}",pci_bus_id="00000000:0{gpu}:00.0",device="nvidia{gpu}",'
            f'modelName="NVIDIA H200",Hostname="node"}} {value}'
            for field, value in FIELDS.items()
            for gpu in (0, 1)
        ]
        body = "\n".join([*lines, ""]).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def exporter() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Exporter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_no_panel_of_the_gpus_is_dead_beside_a_dcgm_exporter(exporter: str, tmp_path: Path) -> None:
    texts = for_prometheus(tmp_path, ["127.0.0.1:1"], fleet="", dcgm=[exporter], has_ray=False, objective=0.99)
    outputs.write_files("DIR", tmp_path, texts)
    often(tmp_path / "prometheus.yml")
    begin_s = time.time()
    with running(tmp_path / "prometheus.yml", tmp_path / "data") as server:
        eventually(lambda: not without_data(server, begin_s, [GPU_DASHBOARD.uid]), "every line has data", 60.0, 1.0)
        assert server.api.query('ALERTS{alertname=~"Gpu.*"}') == []
