"""`kervan calibrate`: what it measures runs here on CPU in small, the choices and files by tables.

vLLM's server takes a minute to start here, so a server that answers as it does stands in for it.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click.testing
import planner_points
import pytest
from harness.places import BENCHMARKS, MODELS
from harness.rank_work import die, fail, hang

from kervan.calibrate import choose, kernels, measure_host, measurements, serving, shapes
from kervan.calibrate.choose import GIB, Shape
from kervan.calibrate.measurements import Attention, Collective, Copy, Floor, Matmul, Measurements, Memory, Serving
from kervan.calibrate.serving import Point, Server, ServingRuns
from kervan.cli import calibrate as command
from kervan.comm.clock import num_calls
from kervan.config import engine_arguments
from kervan.errors import ConfigError, EngineError
from kervan.plan import calibration
from kervan.ranks import start
from kervan.ranks.rank import Work


def server(model: str = "m", tp: int = 1, pp: int = 1, ep: int = 1, gpus: tuple[int, ...] = (0,)) -> Server:
    return Server(model, Path("/m"), tp, pp, ep, gpus, (Point(1),))


# ---- what is measured, on CPU


@pytest.mark.parametrize(
    ("work", "for_s", "message", "rows"),
    [
        (fail, 60.0, r"rank 0 of 1: RuntimeError: no memory \(fail, line", ["one row"]),
        (die, 60.0, "rank 0 of 1 exited with status 9 without a message", []),
        (hang, 60.0, r"1 of 1 ranks made no progress: a wait takes too long .* in hang \(rank_work.py", []),
    ],
)
def test_rows_of_a_process_that_fails_are_kept(work: Work, for_s: float, message: str, rows: list[str]) -> None:
    found = []
    with pytest.raises(EngineError, match=message):
        for row in start.run(work, "memory", for_s=for_s):
            found.append(row)
    assert found == rows


def test_a_part_that_fails_is_noted_and_the_next_goes_on() -> None:
    found = measure_host.MeasurementLog(Measurements(gpu="g", num_gpus=1, hardware={}, versions={}, date=""))

    def rows() -> Any:
        yield Copy(2, 1.0)
        raise EngineError("lost")

    said: list[str] = []
    found.keep_all(rows(), "kernels", said.append)
    assert (found.value.copy, found.value.notes) == ((Copy(2, 1.0),), ("kernels: lost",))
    assert said == ["kernels: lost"]


@pytest.mark.parametrize(
    ("estimate_s", "at_least", "count"),
    [(1e-3, 1, 4), (1e-3, 6, 6), (1.0, 1, 1), (1e-5, 1, 400), (0.0, 1, 400)],  # 4 ms a repeat, at most 400 calls
)
def test_calls_of_a_repeat(estimate_s: float, at_least: int, count: int) -> None:
    assert num_calls(estimate_s, at_least) == count


# ---- files


LLAMA_8B = json.loads((MODELS / "llama3-8b/config.json").read_text())


def whole() -> Measurements:
    point = {"model": "m", "tp": 2, "pp": 1, "ep": 1}
    return Measurements(
        gpu="NVIDIA H100 80GB HBM3",
        num_gpus=2,
        hardware={"cores": 32},
        versions={"vllm": "0.24.0"},
        date="2026-11-25T12:00:00+00:00",
        copy=(Copy(2 << 30, 1e-3),),
        matmul=(Matmul(1, 4096, 4096, 1.2e-5), Matmul(4096, 4096, 4096, 2e-4)),
        attention=(Attention("decode", 8, 1024, 32, 8, 128, "flash", 2e-5),),
        collectives=(
            Collective("all_reduce", 2, 8192, True, "nccl", 1e-5),
            Collective("all_reduce", 2, 1 << 28, True, "nccl", 1e-3),
        ),
        floors=(Floor("graph_kernel", 1.5e-6),),
        serving=(
            Serving(
                **point, isl=1024, osl=256, concurrency=16, num_requests=64, out_tok_s=2303.4, ttft_p50_s=0.29,
                ttft_p99_s=0.38, tpot_p50_s=0.0059, tpot_p99_s=0.0068,
            ),
        ),
        memory=(
            Memory(
                **point, gpu_memory_utilization=0.92, weights_gib_per_gpu=7.5, kv_cache_gib_per_gpu=60.0,
                kv_cache_tokens=983040,
            ),
        ),
        models={"m": LLAMA_8B},
        notes=("left out",),
    )  # fmt: skip


def test_measurements_survive_json() -> None:
    assert measurements.from_dict(json.loads(json.dumps(measurements.to_dict(whole())))) == whole()
    assert measurements.slug(whole()) == "2xh100-80gb-hbm3"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format 2, this kervan reads 1"),
        ({"speed": 1}, "speed"),
        ({"copy": [{"bytes": 1}]}, "seconds"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(json.dumps({**measurements.to_dict(whole()), **change}))
    with pytest.raises(ConfigError, match=message):
        measurements.read(path)
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="format None"):
        measurements.read(path)
    path.write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        measurements.read(path)


# ---- the command


def calibrate(*words: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(command.calibrate, list(words))


def test_stored_measurements_are_shown(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    measurements.write(path, whole())
    shown = calibrate("--measurements", str(path))
    assert shown.exit_code == 0, shown.exception
    # 2 GiB in 1 ms; 2 * 4096^3 in 0.2 ms; 2 * 4096^2 bytes in 12 us; bus = 2 * (1/2) * 256 MiB / 1 ms
    for words in ("copy 2.15 TB/s", "687 TFLOP/s (m 4096)", "2.80 TB/s (m 1)", "268 GB/s (bus)", "2,303", "983,040"):
        assert words in shown.output
    assert "not complete: left out" in shown.output
    told = json.loads(calibrate("--measurements", str(path), "--json").stdout)
    fitted = calibration.load(Path(told.pop("calibration")))
    assert measurements.from_dict(told) == whole()
    assert fitted.gpu == "H100" and [one.point for one in fitted.residuals] == ["m tp 2 pp 1, 16 streams, 1024/256"]


def test_a_host_without_a_gpu_is_told(tmp_path: Path) -> None:
    done = calibrate("--no-serving", "--output", str(tmp_path / "x.json"))
    assert isinstance(done.exception, ConfigError)
    assert "torch sees no GPU here" in str(done.exception)
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize(
    ("missing", "words", "message"),
    [
        ("torch", ["--no-serving"], r"needs torch .* pip install 'kervan\[gpu\]'"),
        ("vllm", [], r"need vLLM, .* pip install 'kervan\[gpu\]', or give --no-serving"),
        ("nothing", ["--for", "20s"], "below 30 s"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, words: list[str], message: str
) -> None:
    monkeypatch.setattr(measure_host.importlib.util, "find_spec", lambda name: None if name == missing else object())
    with pytest.raises(ConfigError, match=message):
        calibrate(*words)
        raise calibrate(*words).exception or AssertionError("no error")


def test_models_are_checked_before_anything_is_measured(tmp_path: Path) -> None:
    for text, message in [("[]", "holds a JSON list"), ("{}", "no usable 'hidden_size'"), ("{", "cannot be read")]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            measure_host.check(measure_host.Settings(models=(tmp_path,)))


def test_models_need_names_of_their_own(tmp_path: Path) -> None:
    places = [tmp_path / part / "m" for part in ("a", "b")]
    for place in places:
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(dict(choose.SHAPES["llama-1b"])))
    device = kernels.HostGpus("NVIDIA H100", 1, 80 * GIB, ())
    with pytest.raises(ConfigError, match="m, m have the same name"):
        measure_host._shapes(measure_host.Settings(models=tuple(places)), device)
    assert [shape.name for shape in measure_host._shapes(measure_host.Settings(models=(places[0],)), device)] == ["m"]
    assert [shape.name for shape in measure_host._shapes(measure_host.Settings(is_quick=True), device)] == ["llama-14b"]


# ---- choices


def test_weights_of_known_models() -> None:
    for name, weights in [("llama-8b", 8.03e9), ("llama-14b", 14.5e9)]:
        assert choose.weights_bytes(Shape(name, choose.SHAPES[name])) == pytest.approx(2 * weights, rel=0.02)
    config = json.loads((BENCHMARKS / "models/qwen3-30b-a3b/config.json").read_text())
    assert choose.weights_bytes(Shape("moe", config)) == pytest.approx(2 * 30.5e9, rel=0.02)


@pytest.mark.parametrize(
    ("memory_gib", "names"),
    [
        (80, ["llama-14b", "llama-8b"]),
        (40, ["llama-8b", "llama-3b"]),
        (24, ["llama-3b", "llama-1b"]),
        (2, ["llama-1b"]),
    ],
)
def test_default_shapes_take_half_of_the_memory(memory_gib: int, names: list[str]) -> None:
    assert [shape.name for shape in choose.default_shapes(memory_gib * GIB)] == names


@pytest.mark.parametrize(
    ("num_gpus", "expected"),
    [
        (1, ["14b 1x1 0", "8b 1x1 0"]),
        (2, ["14b 1x1 0", "8b 1x1 1", "8b 2x1 0,1", "8b 1x2 0,1"]),
        (4, ["14b 1x1 0", "8b 1x1 1", "8b 2x1 2,3", "8b 1x2 0,1", "14b 4x1 0,1,2,3"]),
        (8, ["14b 1x1 0", "8b 1x1 1", "8b 2x1 2,3", "8b 1x2 4,5", "14b 8x1 0,1,2,3,4,5,6,7"]),
    ],
)
def test_servers_for_a_host(num_gpus: int, expected: list[str]) -> None:
    made = [(shape, Path("/x")) for shape in choose.default_shapes(80 * GIB)]
    found = choose.servers(made, num_gpus, 80 * GIB, is_quick=False)
    names = [f"{s.model.removeprefix('llama-')} {s.tp}x{s.pp} {','.join(map(str, s.gpus))}" for s in found]
    assert names == expected
    quick = choose.servers(made[:1], num_gpus, 80 * GIB, is_quick=True)
    assert [(s.tp, s.pp) for s in quick] == [(1, 1), (2, 1)][:num_gpus]


def test_a_model_that_does_not_fit_is_refused_with_its_size() -> None:
    big = Shape("llama-14b", choose.SHAPES["llama-14b"])
    assert choose.smallest_tp(big, 8, 16 * GIB) == 4  # 27 GiB: over 0.7 * 2 * 16 = 22.4, under 44.8
    with pytest.raises(ConfigError, match="about 27 GiB of weights, 2 GPUs have 32 GiB"):
        choose.smallest_tp(big, 2, 16 * GIB)


@pytest.mark.parametrize(("num_gpus", "sizes"), [(1, []), (2, [2]), (3, [2, 3]), (4, [2, 4]), (8, [2, 4, 8])])
def test_groups_of_ranks(num_gpus: int, sizes: list[int]) -> None:
    assert measure_host.group_sizes(num_gpus) == sizes


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([(0,), (1,), (0, 1), (0,), (1,)], [2, 1, 2]),
        ([(0,), (0,)], [1, 1]),
        ([(0, 1), (2, 3), (1,)], [2, 1]),
        ([], []),
    ],
)
def test_servers_side_by_side(gpus: list[tuple[int, ...]], expected: list[int]) -> None:
    servers = [server(tp=len(one), gpus=one) for one in gpus]
    assert [len(phase) for phase in serving.phases(servers)] == expected


@pytest.mark.parametrize(("concurrency", "requests"), [(1, 8), (2, 8), (16, 64), (64, 256), (256, 512), (600, 600)])
def test_requests_of_a_point(concurrency: int, requests: int) -> None:
    assert Point(concurrency).num_requests == requests


def test_loads_of_a_server_fit_its_context() -> None:
    for is_quick in (True, False):
        loads = choose.points(is_quick)
        assert all(load.isl + load.osl <= serving.ENGINE_ARGS["max_model_len"] for load in loads)
        assert {load.concurrency for load in loads if load.osl == 8} == {1}  # single prompts: prefill alone
        assert len({load.concurrency for load in loads}) > 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: server(tp=2, gpus=(0,)), "tp 2 x pp 1 needs 2 GPUs, not '0'"),
        (lambda: server(tp=2, gpus=(0, 0)), "needs 2 GPUs, not '0,0'"),
        (lambda: server(tp=2, ep=4, gpus=(0, 1)), "ep is 1 or as large as tp"),
        (lambda: Point(0), "at least 1 stream"),
        (lambda: Point(1, 1, 1), "2 out"),
    ],
)
def test_impossible_servers_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_arguments_of_a_server() -> None:
    one = server(tp=2, ep=2, gpus=(0, 1))
    words = engine_arguments.to_argv(one.engine_args({"max_model_len": 1024, "enforce_eager": True}))
    assert words == [
        "--load-format", "dummy", "--no-enable-prefix-caching", "--max-model-len", "1024", "--enforce-eager",
        "--tensor-parallel-size", "2", "--pipeline-parallel-size", "1", "--enable-expert-parallel",
        "--served-model-name", "m",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("visible", "expected"), [(None, "0,2"), ("", "0,2"), ("4,5,6", "4,6"), ("GPU-a,b,c", "GPU-a,c")]
)
def test_gpus_count_among_the_visible_ones(visible: str | None, expected: str) -> None:
    assert serving.visible_devices((0, 2), visible) == expected


# ---- vLLM's log. Wording: vllm/v1/worker/gpu_model_runner.py, gpu/model_runner.py, gpu_worker.py, core/kv_cache_utils.py

V1_OF_0_24 = """
(EngineCore_DP0 pid=7) INFO 11-25 12:00:00 [gpu_model_runner.py:5256] Model loading took 14.96 GiB memory and 1.234567 seconds
(EngineCore_DP0 pid=7) INFO 11-25 12:00:30 [gpu_worker.py:509] Available KV cache memory: 53.1 GiB
(EngineCore_DP0 pid=7) INFO 11-25 12:00:30 [gpu_worker.py:524] CUDA graph memory profiling is enabled (default since v0.21.0). The current --gpu-memory-utilization=0.9000 is equivalent to --gpu-memory-utilization=0.8910 without CUDA graph memory profiling.
(EngineCore_DP0 pid=7) INFO 11-25 12:00:30 [kv_cache_utils.py:2146] GPU KV cache size: 434,976 tokens
(EngineCore_DP0 pid=7) INFO 11-25 12:00:30 [kv_cache_utils.py:2147] Maximum concurrency for 8,192 tokens per request: 53.10x
(EngineCore_DP0 pid=7) INFO 11-25 12:00:40 [gpu_model_runner.py:6582] Graph capturing finished in 8 secs, took 0.63 GiB
"""
V2_OF_0_24 = """
(Worker_TP0 pid=8) INFO 11-25 12:00:00 [model_runner.py:303] Model loading took 7.51 GiB and 1.234567 seconds
(Worker_TP1 pid=9) INFO 11-25 12:00:00 [model_runner.py:303] Model loading took 7.52 GiB and 1.234567 seconds
(Worker_TP0 pid=8) INFO 11-25 12:00:30 [gpu_worker.py:509] Available KV cache memory: 60.25 GiB
(Worker_TP1 pid=9) INFO 11-25 12:00:30 [gpu_worker.py:509] Available KV cache memory: 60.2 GiB
(EngineCore_DP0 pid=7) INFO 11-25 12:00:30 [kv_cache_utils.py:2146] GPU KV cache size: 986,304 tokens
"""
OF_0_32 = """
(Worker pid=8) INFO 11-25 12:00:00 [model_runner.py:425] Model loading took 14.96 GiB memory and 1.234567 seconds
(Worker pid=8) INFO 11-25 12:00:30 [gpu_worker.py:759] Available KV cache memory: 53.10 GiB
(EngineCore pid=7) INFO 11-25 12:00:30 [kv_cache_utils.py:2327] GPU KV cache size: 434,976 tokens, Maximum concurrency for 8,192 tokens per request: 53.10x
"""
# recorded with vLLM 0.32 on CPU, which does not tell weights
ON_CPU = """
(Worker pid=8731) INFO 11-25 14:09:51 [cpu_worker.py:260] Explicitly set (1.0/11.84) GiB for KV cache on node 0.
(EngineCore pid=8713) INFO 11-25 14:09:51 [kv_cache_utils.py:2327] CPU KV cache size: 1,048,576 tokens, Maximum concurrency for 1,024 tokens per request: 1024.00x
"""


@pytest.mark.parametrize(
    ("log", "given", "expected"),
    [
        (V1_OF_0_24, {}, (0.9, 14.96, 53.1, 434_976, 0.63)),
        (V2_OF_0_24, {}, (0.92, 7.52, 60.2, 986_304, None)),
        (V2_OF_0_24, {"gpu_memory_utilization": 0.5}, (0.5, 7.52, 60.2, 986_304, None)),
        (OF_0_32, {}, (0.92, 14.96, 53.1, 434_976, None)),
    ],
)
def test_memory_from_a_log(log: str, given: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = serving.parse_memory(log, server(), given, 41.0)
    assert found is not None
    assert expected == (
        found.gpu_memory_utilization, found.weights_gib_per_gpu, found.kv_cache_gib_per_gpu, found.kv_cache_tokens,
        found.cuda_graph_gib,
    )  # fmt: skip
    assert (found.model, found.tp, found.start_s) == ("m", 1, 41.0)


def test_a_log_that_tells_too_little_gives_no_row() -> None:
    assert serving.parse_memory(ON_CPU, server()) is None
    assert serving.parse_memory("", server()) is None


# ---- servers

STAND_IN = """
import json, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

port, name, log = int(sys.argv[1]), sys.argv[2], sys.argv[3]
print(log, flush=True)
if name == "broken":
    sys.exit("ValueError: no kernel image is available")

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    def log_message(self, *words): pass
    def do_GET(self):
        found = self.path == "/v1/models"
        self.answer(200 if found else 404, json.dumps({"data": [{"id": name}]}).encode())
    def answer(self, status, body, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        count, n = asked["max_tokens"], len(asked["prompt"])
        if name == "refuses" and n > 16:
            return self.answer(500, b'{"error": {"message": "out of memory"}}')
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for i in range(count):
            time.sleep(0.002)
            self.event({"choices": [{"index": 0, "text": "a", "finish_reason": "length" if i == count - 1 else None}]})
        usage = {"prompt_tokens": n, "completion_tokens": count, "total_tokens": n + count}
        self.event({"choices": [], "usage": usage})
        self.piece(b"data: [DONE]\\n\\n")
        self.piece(b"")
    def event(self, value):
        self.piece(b"data: " + json.dumps({"model": name, **value}).encode() + b"\\n\\n")
    def piece(self, data):
        self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data))
        self.wfile.flush()

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

Server(("127.0.0.1", port), Handler).serve_forever()
"""


def stand_in(server: Server, port: int, engine_args: Mapping[str, Any]) -> list[str]:
    return [sys.executable, "-c", STAND_IN, str(port), server.model, V2_OF_0_24]


def test_servers_of_a_phase_are_loaded_together_and_failures_noted(tmp_path: Path) -> None:
    def one(model: str, gpu: int) -> Server:
        return Server(model, tmp_path, 1, 1, 1, (gpu,), (Point(1, 32, 6), Point(3, 32, 6)))

    events: list[Any] = []
    runs = ServingRuns(
        log_dir=tmp_path / "logs", for_s=240, on_row=events.append, on_note=events.append, say=events.append,
        command=stand_in,
    )  # fmt: skip
    runs.measure([one("whole", 0), one("broken", 1), one("refuses", 2), one("later", 0)])

    rows = [event for event in events if isinstance(event, Serving)]
    assert [(row.model, row.concurrency, row.num_requests) for row in rows] == [
        ("whole", 1, 8), ("whole", 3, 12), ("later", 1, 8), ("later", 3, 12),
    ]  # fmt: skip
    for row in rows:
        assert row.out_tok_s > 0
        assert 0 < row.tpot_p50_s <= row.tpot_p99_s, row

    memory = [event for event in events if isinstance(event, Memory)]
    assert sorted(row.model for row in memory) == ["later", "refuses", "whole"]
    assert memory[0].start_s is not None
    said = [event for event in events if isinstance(event, str)]
    assert any("broken tp 1 pp 1: exited 1: " in text and "no kernel image is available" in text for text in said)
    assert any(text.startswith("refuses tp 1 pp 1: 1 streams") and "no row, 0 of 8" in text for text in said)
    assert events.index("starting later tp 1 pp 1") > events.index(rows[1])  # no start while others are loaded


def test_without_time_nothing_is_started(tmp_path: Path) -> None:
    notes: list[str] = []

    def never(*_: Any) -> list[str]:
        raise AssertionError("started")

    runs = ServingRuns(log_dir=tmp_path, for_s=20, on_row=never, on_note=notes.append, command=never)
    runs.measure([server()])
    assert notes == ["m tp 1 pp 1: not measured, 10 s were left"]  # 20 s less 10 s to stop servers


# ---- models without weights, and the lines of benchmarks/planner_points.py


@pytest.mark.parametrize(("shape", "message"), [({}, "vocab_size None"), ({"vocab_size": 100}, "100 is outside 258")])
def test_models_without_a_vocabulary_are_refused(tmp_path: Path, shape: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes.write_model(shape, tmp_path / "m")


def test_lines_of_planner_points() -> None:
    one = planner_points.parse_line("llama3-8b tp=2 pp=2 gpus=4,5,6,7 conc=1,8@3000/200 osl=128", Path("/m"))
    assert (one.model, one.tp, one.pp, one.ep, one.gpus) == ("llama3-8b", 2, 2, 1, (4, 5, 6, 7))
    assert one.points == (Point(1, 1024, 128), Point(8, 3000, 200))
    assert planner_points.parse_line("x tp=2 ep=2", Path("/m")).gpus == (0, 1)
    spread = planner_points.parse_line("x tp=2 dp=2 ep=4", Path("/m"))
    assert (spread.gpus, str(spread)) == ((0, 1, 2, 3), "x tp 2 pp 1 dp 2 ep 4")
    assert spread.engine_args({})["data_parallel_size"] == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x tp=two", "write for example"),
        ("x gpu=0", "gpu; the keys are"),
        ("x tp=1 tp=2", "given twice"),
        ("x conc=1@30", "write for example"),
    ],
)
def test_bad_lines_of_planner_points_are_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planner_points.parse_line(line, Path("/m"))
