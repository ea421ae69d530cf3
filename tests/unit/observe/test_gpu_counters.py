"""Counters of GPUs: NVML's under dcgm-exporter's names, and dcgm-exporter's own page."""

import dataclasses
import http.server
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from harness.fake_nvml import FakeGpu, FakeNvml
from prometheus_client.parser import text_string_to_metric_families

from kervan.cli import observe_gpus
from kervan.cli.observe import observe
from kervan.errors import ConfigError, EngineError
from kervan.observe import dcgm, gpu_counters
from kervan.observe.dcgm import BY_NAME, DEV, PROF, GpuCounters
from kervan.observe.gpu_counters import GpuReader


def reader(*gpus: FakeGpu, step_s: float = 2.0) -> tuple[GpuReader, FakeNvml]:
    nvml = FakeNvml(*gpus)
    clock = iter(float(number) * step_s for number in range(1000))
    return GpuReader(nvml, now_s=lambda: next(clock), sleep=lambda _: None), nvml


def test_a_hopper_gpu_has_everything_under_dcgms_names_and_units() -> None:
    reading, nvml = reader(FakeGpu())
    (gpu,) = reading.read()
    assert gpu.values == {
        f"{DEV}GPU_UTIL": 97, f"{DEV}MEM_COPY_UTIL": 40, f"{DEV}FB_USED": 102_400, f"{DEV}FB_FREE": 41_984,
        f"{DEV}SM_CLOCK": 1980, f"{DEV}MEM_CLOCK": 3201, f"{DEV}GPU_TEMP": 47, f"{DEV}MEMORY_TEMP": 55,
        f"{DEV}POWER_USAGE": 512.5, f"{DEV}TOTAL_ENERGY_CONSUMPTION": 123_456, f"{DEV}CLOCKS_EVENT_REASONS": 4,
        f"{DEV}PCIE_REPLAY_COUNTER": 2, f"{DEV}ECC_SBE_VOL_TOTAL": 5, f"{DEV}ECC_DBE_VOL_TOTAL": 0,
        f"{DEV}UNCORRECTABLE_REMAPPED_ROWS": 1, f"{DEV}ROW_REMAP_FAILURE": 0, f"{DEV}XID_ERRORS": 0,
        f"{PROF}GR_ENGINE_ACTIVE": 0.99, f"{PROF}SM_ACTIVE": 0.615, f"{PROF}SM_OCCUPANCY": 0.2,
        f"{PROF}PIPE_TENSOR_ACTIVE": 0.48, f"{PROF}DRAM_ACTIVE": 0.73, f"{PROF}PCIE_TX_BYTES": 100 * 2**20,
        f"{PROF}PCIE_RX_BYTES": 200 * 2**20, f"{PROF}NVLINK_RX_BYTES": 1000 * 2**20,
        f"{PROF}NVLINK_TX_BYTES": 2000 * 2**20,
    }  # fmt: skip
    assert (gpu.uuid, gpu.name, gpu.throttle) == ("GPU-0", "NVIDIA H200", ("software power cap",))
    reading.close()
    assert nvml.samples == []


def test_every_counter_has_a_source_and_every_source_a_counter() -> None:
    reading, _ = reader(FakeGpu())
    assert reading.read()[0].values.keys() == BY_NAME.keys()


def test_readings_one_after_the_other_free_their_samples() -> None:
    reading, nvml = reader(FakeGpu("GPU-0"), FakeGpu("GPU-1"))
    for over_s in (0.0, 1.0, 0.0):
        reading.read(over_s)
        assert len(nvml.samples) == 2
    reading.close()
    assert nvml.samples == []


def test_a_gpu_without_gpm_has_rates_from_the_drivers_counters_and_no_shares() -> None:
    gpu = FakeGpu(name="NVIDIA A100", gpm=None)
    reading, _ = reader(gpu)  # a reading is 2 s after the one before
    gpu.fields |= {197: 5000, 198: 2000, 138: 30}
    (found,) = reading.read()
    assert found.values[f"{PROF}PCIE_TX_BYTES"] == 2000
    assert found.values[f"{PROF}PCIE_RX_BYTES"] == 0
    assert found.values[f"{PROF}NVLINK_TX_BYTES"] == 10 * 1024
    assert f"{PROF}SM_ACTIVE" not in found.values
    gpu.fields[197] = 10  # the driver was loaded anew
    assert f"{PROF}PCIE_TX_BYTES" not in reading.read()[0].values


def test_what_a_gpu_does_not_tell_is_missing_and_not_zero() -> None:
    missing = frozenset({"nvmlDeviceGetPowerUsage", "nvmlDeviceGetTotalEccErrors", "nvmlGpmSampleGet"})
    reading, nvml = reader(FakeGpu(missing=missing, fields={}))
    nvml.has_events = False
    values = reading.read()[0].values
    assert not {f"{DEV}POWER_USAGE", f"{DEV}ECC_DBE_VOL_TOTAL", f"{PROF}SM_ACTIVE", f"{DEV}MEMORY_TEMP"} & values.keys()
    assert values[f"{DEV}GPU_UTIL"] == 97
    assert nvml.samples == []


def test_an_xid_is_told_of_its_gpu_and_stays() -> None:
    one, two = FakeGpu("GPU-0"), FakeGpu("GPU-1")
    reading, nvml = reader(one, two)
    nvml.events.extend([(two, 31), (two, 79)])
    for _ in range(2):
        assert [gpu.values[f"{DEV}XID_ERRORS"] for gpu in reading.read()] == [0, 79]


def test_where_xids_are_not_told_there_is_none() -> None:
    nvml = FakeNvml(FakeGpu())
    nvml.has_events = False
    assert f"{DEV}XID_ERRORS" not in GpuReader(nvml, sleep=lambda _: None).read()[0].values


def test_throttle_reasons_have_names_and_older_packages_too() -> None:
    reading, _ = reader(FakeGpu(reasons=0x60, missing=frozenset({"nvmlDeviceGetCurrentClocksEventReasons"})))
    assert reading.read()[0].throttle == ("software thermal slowdown", "hardware thermal slowdown")
    assert dcgm.reasons(0) == ()


def page() -> str:
    reading, _ = reader(FakeGpu("GPU-0"), FakeGpu("GPU-1"))
    return dcgm.page(reading.read(), "node-1")


def test_its_page_is_what_prometheus_reads_and_what_it_reads_itself() -> None:
    families = {family.name: family for family in text_string_to_metric_families(page())}
    sample = families[f"{PROF}SM_ACTIVE"].samples[1]
    assert sample.value == 0.615
    assert sample.labels == {
        "gpu": "1", "UUID": "GPU-1", "device": "nvidia1", "modelName": "NVIDIA H200", "Hostname": "node-1"
    }  # fmt: skip
    again = dcgm.parse(page())
    assert [(gpu.index, gpu.uuid) for gpu in again] == [(0, "GPU-0"), (1, "GPU-1")]
    assert again[0].values.keys() == BY_NAME.keys()
    assert all(math.isfinite(value) for gpu in again for value in gpu.values.values())


DCGM = """# HELP DCGM_FI_DEV_SM_CLOCK SM clock frequency (in MHz).
# TYPE DCGM_FI_DEV_SM_CLOCK gauge
DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-ab",pci_bus_id="00000000:0F:00.0",device="nvidia0",modelName="NVIDIA H200",Hostname="n"} 1980
DCGM_FI_DEV_CLOCK_THROTTLE_REASONS{gpu="0",UUID="GPU-ab",device="nvidia0",modelName="NVIDIA H200"} 8
DCGM_FI_DEV_ENC_UTIL{gpu="0",UUID="GPU-ab",device="nvidia0",modelName="NVIDIA H200"} 0
DCGM_FI_PROF_DRAM_ACTIVE{gpu="0",UUID="GPU-ab",modelName="NVIDIA H200",container="x",pod="a,b}c"} 0.25
DCGM_FI_DEV_SM_CLOCK{gpu="0",UUID="GPU-ab",GPU_I_ID="7",GPU_I_PROFILE="1g.18gb"} 100
"""


def test_a_dcgm_exporters_page_is_read_and_what_is_unknown_in_it_left_out() -> None:
    (gpu,) = dcgm.parse(DCGM)
    assert gpu == GpuCounters(
        index=0, uuid="GPU-ab", name="NVIDIA H200",
        values={f"{DEV}SM_CLOCK": 1980.0, f"{DEV}CLOCKS_EVENT_REASONS": 8.0, f"{PROF}DRAM_ACTIVE": 0.25},
    )  # fmt: skip
    assert gpu.throttle == ("hardware slowdown",)


def test_numbers_that_are_none_are_left_out() -> None:
    labels = 'gpu="0",UUID="GPU-ab",modelName="NVIDIA H200"'
    lines = (f"DCGM_FI_DEV_SM_CLOCK{{{labels}}} 1980", f"DCGM_FI_DEV_GPU_TEMP{{{labels}}} nan",
             f"DCGM_FI_DEV_POWER_USAGE{{{labels}}} +Inf")  # fmt: skip
    (gpu,) = dcgm.parse("\n".join(lines))
    assert gpu.values == {f"{DEV}SM_CLOCK": 1980.0}


def test_the_page_of_an_exporter_is_found_without_scheme_and_path() -> None:
    for text in ("127.0.0.1:9400", "http://127.0.0.1:9400", "http://127.0.0.1:9400/", "127.0.0.1:9400/metrics"):
        assert dcgm.page_url(text, "--dcgm") == "http://127.0.0.1:9400/metrics"


@contextmanager
def exporter(text: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
        server.shutdown()


# ---- the command


def test_a_dcgm_exporter_is_used_where_one_answers() -> None:
    with exporter(DCGM) as url:
        done = CliRunner().invoke(observe, ["gpus", "--dcgm", url, "--json"])
    told = json.loads(done.stdout)
    assert (told["source"], told["gpus"][0]["values"][f"{DEV}SM_CLOCK"]) == ("dcgm-exporter", 1980.0)
    assert told["gpus"][0]["throttle"] == ["hardware slowdown"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    nvml = FakeNvml(FakeGpu())

    @contextmanager
    def opened() -> Iterator[GpuReader]:
        reading = GpuReader(nvml, sleep=lambda _: None)
        yield reading
        reading.close()

    monkeypatch.setattr(gpu_counters, "opened", opened)
    monkeypatch.setattr(dcgm, "URL", "http://127.0.0.1:9/metrics")
    return nvml


def test_without_one_nvml_is_asked_and_a_row_a_gpu_printed(fake: FakeNvml) -> None:
    done = CliRunner().invoke(observe, ["gpus"])
    assert done.exit_code == 0, done.output
    head, row = done.stdout.splitlines()
    assert head.split()[:6] == ["GPU", "name", "GPU_UTIL", "SM_ACTIVE", "TENSOR", "DRAM"]
    assert "97%" in row and "62%" in row and "100.0 GiB" in row and row.rstrip().endswith("software power cap")
    assert fake.samples == []


def test_prometheus_text(fake: FakeNvml) -> None:
    done = CliRunner().invoke(observe, ["gpus", "--metrics"])
    assert "DCGM_FI_PROF_SM_ACTIVE{" in done.stdout


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--every 0.1s", "--every 0.1 s is below 0.2 s"),
        ("--json --metrics", "give one of them"),
        ("--listen 9400 --watch", "--listen prints nothing"),
    ],
)
def test_wrong_words_are_refused_with_the_fix(words: str, problem: str) -> None:
    done = CliRunner().invoke(observe, ["gpus", *words.split()])
    assert isinstance(done.exception, ConfigError)
    assert problem in str(done.exception)


def test_a_machine_without_gpus_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened() -> Iterator[None]:
        yield None

    monkeypatch.setattr(gpu_counters, "opened", opened)
    monkeypatch.setattr(dcgm, "URL", "http://127.0.0.1:9/metrics")
    done = CliRunner().invoke(observe, ["gpus"])
    assert isinstance(done.exception, EngineError)
    assert "pip install nvidia-ml-py" in str(done.exception)


def test_an_exporter_that_was_named_must_answer() -> None:
    done = CliRunner().invoke(observe, ["gpus", "--dcgm", "http://127.0.0.1:9/metrics"])
    assert isinstance(done.exception, EngineError)
    assert "leave --dcgm out" in str(done.exception)


def test_columns_that_no_gpu_has_are_left_out() -> None:
    values = {f"{DEV}GPU_UTIL": 5.0}
    made = observe_gpus.table((GpuCounters(index=0, uuid="u", name="n", values=values),))
    assert [column.header for column in made.columns] == ["GPU", "name", "GPU_UTIL", "held down by"]
    assert dataclasses.replace(GpuCounters(index=0, uuid="u", name="n")).throttle is None
