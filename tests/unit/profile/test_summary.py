"""What a profile says: shares, requests, gateways, the next lever; worked out by hand."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kervan.profile import html_report, lever, perfetto, summary, text
from kervan.profile import trace as traces
from kervan.profile.lever import Findings
from kervan.profile.samples import StackSamples

REAL = Path(__file__).parents[2] / "data" / "profile" / "cpu-vllm032.json.gz"
MS = 1_000_000
BASE = 1_790_000_000_000_000_000


def span(name: str, begin_ms: int, end_ms: int, **facts: int) -> list[Any]:
    return [name, BASE + begin_ms * MS, BASE + end_ms * MS, facts]


BATCH = {"sequences": 8, "context_tokens": 800, "prefill_tokens": 0, "prefill_pairs": 0}
ENGINE = {
    "begin_ns": BASE, "end_ns": BASE + 100 * MS, "standstill_s": 0.5, "num_steps": 2, "ended_by": "time", "problem": "",
    "pid": 3,
    "spans": [
        span("no work", 0, 20), span("schedule", 20, 30, **BATCH), span("step", 20, 60),
        span("schedule", 60, 70, sequences=8, context_tokens=808, prefill_tokens=16, prefill_pairs=136),
        span("update requests", 90, 95), span("take requests", 98, 120),
    ],
}  # fmt: skip
REQUEST = {
    "path": "/v1/completions", "status": 200, "seconds": 2.0, "stream_id": "", "client_id": "mine", "delivery_s": 0.1,
    "before": [{"part": "admission", "start_s": 0, "seconds": 0.1}, {"part": "tokenisation", "start_s": 0.1, "seconds": 0.1}],
    "streams": [{"parts": [{"part": "prefill", "start_s": 0.2, "seconds": 0.3}, {"part": "decode", "start_s": 0.5, "seconds": 1.4}]}],
}  # fmt: skip
GATEWAY = {
    "gateway": "gw-1", "begin_ns": BASE, "end_ns": BASE + 10_000 * MS, "cpu_s": 2.0, "active_s": 2.0, "tokens": 20_000,
    "totals": {"routing": {"calls": 4, "seconds": 0.001}}, "spans": [["routing", BASE, BASE + MS]],
    "requests": [{"received_unix_s": BASE / 1e9, "request": REQUEST}],
}  # fmt: skip
STACKS = 'thread (0x1): "M";send (uvicorn/x.py:1) 60\nthread (0x1): "M";Runner.run (asyncio/runners.py:86) 400'


def summarised(**changes: Any) -> summary.Summary:
    given: dict[str, Any] = {
        "window_s": 20, "engine": ENGINE, "trace": None, "gateways": [GATEWAY],
        "stacks": {"gateway gw-1": STACKS}, "sampled_s": 5,
    }  # fmt: skip
    return summary.summarise("r-1", **given | changes)


def test_the_loops_shares_add_up_to_1_and_stay_within_the_window() -> None:
    engine = summarised().engine
    assert engine is not None
    assert engine.host_shares == pytest.approx(
        {"no work": 0.2, "schedule": 0.2, "update requests": 0.05, "take requests": 0.02, "other": 0.53}
    )
    # Two steps in the 80 ms in which there was work: 8 streams, of 32 tokens 16 of prompts.
    assert (engine.batch.streams, engine.batch.prefill_share, engine.batch.step_s) == (8, 0.5, pytest.approx(0.04))


def test_time_in_two_parts_is_counted_for_one() -> None:
    spans = {"forward": [(0.0, 50.0)], "schedule": [(40.0, 60.0)]}
    assert summary.partition(spans, (0, 100)) == pytest.approx({"forward": 0.5, "schedule": 0.1, "other": 0.4})


def test_a_gateways_cpu_per_token_is_split_by_its_stacks_without_its_waiting() -> None:
    (gateway,) = summarised().gateways
    assert (gateway.busy, gateway.tokens_per_s, gateway.us_per_token) == (0.2, 2000, 100)
    # 20% of a core allow 100 samples in 5 s; 60 wrote to clients, so 40 of the loop's 400 worked.
    assert gateway.parts == pytest.approx({"writing to clients": 60, "event loop": 40})
    assert summary.working_samples(StackSamples(9, 0, (("JSON", 9),), ()), 3) == {"JSON": 9}


def test_a_gateways_stacks_are_held_against_the_time_in_which_they_were_sampled() -> None:
    # In the half of the stacks it worked 8% of the time (40 of 500 samples at most), for 4,000 tokens: 2.4 s / 24,000.
    half = GATEWAY | {"end_ns": BASE + 5_000 * MS, "cpu_s": 0.4, "active_s": 0.4, "tokens": 4_000}
    (gateway,) = summarised(sampled_gateways=[half]).gateways
    assert (gateway.busy, gateway.tokens_per_s, gateway.us_per_token) == (
        pytest.approx(2.4 / 15), 1600, pytest.approx(100)
    )  # fmt: skip
    assert gateway.parts == pytest.approx({"writing to clients": 100, "event loop": 0})
    assert gateway.num_samples == 60
    assert any("us per token, by 60 samples: " in line for line in text.lines(summarised(sampled_gateways=[half])))


def test_the_time_of_requests_is_by_part() -> None:
    found = summarised()
    assert found.num_requests == 1
    assert found.request_shares == pytest.approx(
        {"decode": 0.7, "prefill": 0.15, "admission": 0.05, "tokenisation": 0.05, "delivery": 0.05}
    )
    assert next(iter(found.request_shares)) == "decode" and summary.shares_of_requests([]) == {}


def test_a_real_trace_gives_operations_and_the_model_runners_parts() -> None:
    trace = traces.read(REAL.read_bytes())
    ranges = trace.of(traces.RANGE)
    begin, end = (trace.base_ns + round(us * 1e3) for us in (ranges[0].ts, max(event.end for event in ranges)))
    engine = summary.engine_summary({**ENGINE, "begin_ns": begin, "end_ns": end, "spans": []}, trace)
    assert sum(engine.host_shares.values()) == pytest.approx(1)
    assert engine.host_shares["forward"] > 0.1 and engine.host_shares["rest of the model runner"] > 0
    assert sum(kernel.share for kernel in engine.kernels) == pytest.approx(1)
    assert any("mm" in kernel.name for kernel in engine.kernels[:3])


def test_the_json_has_what_scripts_rely_on() -> None:
    told = json.loads(json.dumps(summarised(left_out=["py-spy: why"]).to_dict()))
    assert {"window_s", "replica", "gpu_waits_for", "shares", "kernels", "next", "left_out"} <= told.keys()
    assert (told["gpu_waits_for"], told["left_out"], told["steps"]["traced"]) == (None, ["py-spy: why"], 2)


def test_without_an_engines_record_the_rest_is_told() -> None:
    found = summarised(engine=None)
    assert found.engine is None and found.gateways and "record the engine" in found.next
    assert "\n".join(text.lines(found)).startswith("replica r-1, 20 s\ntime of 1 request: decode 70%")


def test_the_answer_is_at_most_25_lines_and_the_page_says_the_same(tmp_path: Path) -> None:
    found = summarised(trace=traces.read(REAL.read_bytes()), left_out=["one", "two"])
    lines = list(text.lines(found))
    assert len(lines) <= 25 and any(line.startswith("next: ") for line in lines)
    page = tmp_path / "index.html"
    html_report.write(
        page, found, subtitle="a <model>", command="kervan profile", perfetto="p.gz", summary_file="s.json"
    )
    assert "CPU per token of gateway gw-1" in page.read_text() and "a &lt;model&gt;" in page.read_text()
    assert "http" not in page.read_text().replace("ui.perfetto.dev", "")


def test_one_file_has_torchs_events_the_loop_the_gateways_and_their_requests() -> None:
    merged = json.loads(gzip.decompress(perfetto.merged(REAL.read_bytes(), ENGINE, [GATEWAY], replica="r-1")))
    names = {event["args"]["name"] for event in merged["traceEvents"] if event.get("name") == "process_name"}
    assert names >= {"engine loop of r-1", "gateway gw-1", "requests of gateway gw-1"}
    assert {"forward", "schedule", "routing", "decode"} <= {event.get("name") for event in merged["traceEvents"]}


def test_without_torchs_trace_the_file_begins_at_the_first_thing_recorded() -> None:
    merged = json.loads(gzip.decompress(perfetto.merged(b"", ENGINE, [GATEWAY], replica="r-1")))
    assert min(event["ts"] for event in merged["traceEvents"] if event["ph"] == "X") == 0


def test_time_in_which_the_runner_waits_for_the_gpu_has_a_name() -> None:
    def event(cat: str, name: str, ts: float, dur: float, tid: int) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 7, "tid": tid}

    # Of 100 ms: a step that is launched in 10, a wait of 60 in the same thread, and one of another thread.
    events = [
        event("user_annotation", "execute_context_0(0)_generation_8(8)", 20e3, 10e3, 1),
        event("cuda_runtime", "cudaEventSynchronize", 30e3, 60e3, 1),
        event("cuda_runtime", "cudaEventSynchronize", 0, 20e3, 2),
        event("cuda_runtime", "cudaGraphLaunch", 22e3, 2e3, 1),
    ]
    trace = traces.read(json.dumps({"traceEvents": events, "baseTimeNanoseconds": BASE}).encode())
    engine = summary.engine_summary({**ENGINE, "spans": []}, trace)
    assert engine.host_shares == pytest.approx(
        {"waiting for the GPU": 0.6, "rest of the model runner": 0.1, "other": 0.3}
    )


GPU = Findings({"memory": 0.7, "host": 0.2, "nothing to do": 0.1}, has_gpu=True, streams=12, max_streams=256, tp=4)


@pytest.mark.parametrize(
    ("found", "begin"),
    [
        (GPU, "more streams per replica: a step reads all weights for 12 streams of 256 that fit"),
        (replace(GPU, streams=1.0, max_streams=0), "more streams per replica: a step reads all weights for 1 stream; "),
        (replace(GPU, cache_reading=0.57, context_tokens=279248.0), "less KV cache to read: attention over 279,248 cached tokens a step takes 57% of the time; "),
        (replace(GPU, shares={"nothing to do": 0.7, "memory": 0.3}), "nothing here: the replica had no request for 70%"),
        (replace(GPU, request_shares={"queue": 0.1, "replica queue": 0.2}), "more places: requests spend 30%"),
        (replace(GPU, gateway_busy=0.8, num_gateways=2), "another gateway: the busiest one uses 80%"),
        (replace(GPU, shares={"memory": 0.95, "host": 0.05}, gateway_busy=0.95), "another gateway: the busiest one uses 95%"),
        (Findings({"forward": 0.6}, has_gpu=False, gateway_busy=0.8), "another gateway: the busiest one uses 80%"),
        (replace(GPU, shares={"host": 0.5, "memory": 0.5}, host_shares={"schedule": 0.3}), "the host: the GPU waits for it for 50% of the time, of which most goes to schedule"),
        (replace(GPU, shares={"host": 0.5, "memory": 0.5}, is_eager=True), "CUDA graphs: "),
        (replace(GPU, shares={"communication": 0.3, "memory": 0.7}), "a smaller tp: GPUs exchange data for 30% of the time at tp 4"),
        (replace(GPU, shares={"compute": 0.6, "memory": 0.4}, prefill_share=0.9), "less arithmetic: 90%"),
        (Findings({"sampling": 0.3, "forward": 0.6}, has_gpu=False), "sampling: it takes 30%"),
        (Findings({"forward": 0.6, "other": 0.4}, has_gpu=False), "the model: its forward pass takes 60%"),
        (Findings({"forward": 0.3, "schedule": 0.4, "other": 0.3}, has_gpu=False, step_s=0.002), "the host: the model takes 30% of the loop; most of the rest is schedule (40%); in steps of 2.0 ms"),
        (Findings({"no work": 0.9, "other": 0.1}, has_gpu=False), "nothing here"),
        (Findings({}, has_gpu=True), "more streams"),
        (Findings({}, has_gpu=False), "the host: the model takes 0%"),
    ],
)  # fmt: skip
def test_the_next_lever_follows_from_the_shares(found: Findings, begin: str) -> None:
    assert lever.decide(found).startswith(begin)


def test_behind_a_gpu_that_always_works_a_busy_gateway_comes_second() -> None:
    found = replace(GPU, shares={"memory": 0.95, "host": 0.05}, gateway_busy=0.76, num_gateways=1)
    said = lever.decide(found)
    assert said.startswith("more streams per replica") and said.endswith(
        "; then another gateway: the busiest one uses 76% of a core; kervan scale --gateways 2"
    )
