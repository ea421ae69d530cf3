"""GPUs of a fleet's nodes: NVML's of this machine, and a page at the others' port."""

import contextlib
import http.server
import threading
from collections.abc import Iterator

import pytest
from harness.fake_nvml import FakeGpu, FakeNvml
from harness.live import eventually

from kervan.cli.live import fleet_gpus
from kervan.cli.live.fleet_gpus import FleetGpus
from kervan.observe import dcgm, gpu_counters
from kervan.observe.dcgm import PROF, GpuCounters


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    """This machine has two GPUs."""
    fake = FakeNvml(FakeGpu("GPU-0"), FakeGpu("GPU-1"))

    @contextlib.contextmanager
    def opened() -> Iterator[gpu_counters.GpuReader]:
        reader = gpu_counters.GpuReader(fake)
        yield reader
        reader.close()

    monkeypatch.setattr(fleet_gpus.gpu_counters, "opened", opened)
    return fake


@pytest.fixture
def exporter() -> Iterator[int]:
    """What `kervan observe gpus --listen` serves; its port."""
    page = dcgm.page([GpuCounters(index=5, uuid="GPU-5", name="H100", values={f"{PROF}SM_ACTIVE": 0.5})], "host")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(page.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_here_by_nvml_elsewhere_by_a_page_and_nowhere_by_its_reason(nvml: FakeNvml, exporter: int) -> None:
    gpus = FleetGpus("127.0.0.1", ports=[exporter])
    try:
        nodes = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
        found = eventually(
            lambda: (now := gpus.look(nodes)) and "no answer yet" not in now.values() and now, "all answer", 20
        )
        assert [gpu.uuid for gpu in found["127.0.0.1"]] == ["GPU-0", "GPU-1"]
        assert found["127.0.0.1"][0].values[f"{PROF}SM_ACTIVE"] == pytest.approx(0.615)
        assert [(gpu.index, gpu.name) for gpu in found["127.0.0.2"]] == [(5, "H100")]
        assert found["127.0.0.3"] == f"nothing answers at port {exporter}"
    finally:
        gpus.close()
    assert nvml.samples == []  # NVML has its memory back


def test_a_machine_without_gpus_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_gpus.gpu_counters, "opened", lambda: contextlib.nullcontext(None))
    gpus = FleetGpus("127.0.0.1", fetch=lambda _: None)
    try:
        told = eventually(lambda: "NVML finds no GPU" in str(gpus.look([])), "it has looked", 20)
        assert told
    finally:
        gpus.close()
