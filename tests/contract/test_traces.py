"""Traces and `kervan explain` of a real gateway with vLLM's app, over processes of twins, to a real OTLP receiver."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from harness.live import until
from harness.otlp import Collector, Span, collecting
from harness.twin_bench import LIMITS, SECRET
from harness.twin_server import SHAPE

from kervan.cli.explain import explain
from kervan.config.fault import Fault
from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.fleet.process import TWIN_ENGINE, EngineProcess
from kervan.gateway.server import Gateway, GatewayConfig
from kervan.ports import free_port
from kervan.twin.replica import TwinSpec
from kervan.twin.token_engine import StepTiming, TwinSettings, answer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
TIMING = StepTiming(base_s=0.02, prefill_token_s=1e-5, sequence_s=0.0, context_token_s=0.0)
PROMPT, NUM_TOKENS, CRASH_AFTER = [7, 8, 9], 40, 20


class TracedFleet:
    """Two twins and two gateways, of which the first traces."""

    def __init__(self, model: Path, scratch: Path, otlp: str) -> None:
        self.twins = {
            name: EngineProcess(
                TwinSpec(name, "127.0.0.1", SECRET, TwinSettings(TIMING, LIMITS)),
                log_path=scratch / f"{name}.log",
                module=TWIN_ENGINE,
            )
            for name in ("a", "b")
        }
        fleet = FleetConfig(model=str(model), engine_args={"max_model_len": 2048}, engine="twin", gpu="H200", otlp=otlp)
        plain = FleetConfig(model=str(model), engine_args={"max_model_len": 2048}, engine="twin", gpu="H200")
        self.gateways = [
            Gateway(
                GatewayConfig(
                    gateway_id=f"gw-{number}", node="127.0.0.1", engine_argv=config.engine_argv, secret=SECRET,
                    host="127.0.0.1", port=free_port(), internal_host="127.0.0.1", public_host="127.0.0.1",
                    max_queued_streams=64, hold_timeout_s=30.0, stop_timeout_s=5.0, opens_when_attached=False,
                    is_twin=True, shared_port=False, fleet_name="traced", models=(), replay_s=0.0, replay_max_bytes=0,
                    remembered_requests=100, otlp=config.traces_url,
                )
            )
            for number, config in enumerate((fleet, plain), 1)
        ]  # fmt: skip

    def follow(self, *names: str) -> None:
        """The directory lists these twins."""
        replicas = [
            ReplicaEntry(name, "on-demand", "127.0.0.1", twin.pid, "ready", twin.ready.address)
            for name, twin in self.twins.items()
            if twin.ready is not None and name in names
        ]
        entries = [gateway.entry() for gateway in self.gateways]
        for gateway in self.gateways:
            gateway.update(Snapshot(1, replicas, entries, []))

    async def start(self) -> None:
        for gateway in self.gateways:
            await gateway.start()
        await until(lambda: all(twin.ready or twin.failure for twin in self.twins.values()))
        self.follow("a")
        for gateway in self.gateways:
            await gateway.wait_attached()
        self.follow("a")

    async def stop(self) -> None:
        while self.gateways:
            await self.gateways.pop(0).stop()
        for twin in self.twins.values():
            twin.kill()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as found:
        yield found


@pytest.fixture
async def fleet(collector: Collector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TracedFleet]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    running = TracedFleet(tmp_path / "model", tmp_path, collector.url)
    try:
        await running.start()
        yield running
    finally:
        await running.stop()


async def moved_answer(fleet: TracedFleet, url: str, headers: dict[str, str]) -> tuple[httpx.Response, list[int], str]:
    """An answer whose replica, the only one at first, dies on the way; its head, tokens and `id`."""
    fleet.twins["a"].suffer(Fault("crash", CRASH_AFTER))
    body: dict[str, Any] = {
        "prompt": PROMPT, "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True, "return_token_ids": True,
    }  # fmt: skip
    tokens: list[int] = []
    answer_id = ""
    async with httpx.AsyncClient(timeout=60) as client:
        models = (await client.get(f"{url}/v1/models")).json()
        body["model"] = models["data"][0]["id"]
        async with client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                event: dict[str, Any] = json.loads(line[6:])
                answer_id = event["id"]
                tokens += [token for choice in event["choices"] for token in choice["token_ids"] or ()]
                if fleet.twins["a"].ended.is_set():
                    fleet.follow("b")
                elif tokens:
                    fleet.follow("a", "b")
    return response, tokens, answer_id


async def test_a_stream_that_moves_is_one_trace_with_the_move_in_it_and_explained_by_any_gateway(
    fleet: TracedFleet, collector: Collector
) -> None:
    first, second = (gateway.entry().url for gateway in fleet.gateways)
    headers = {"traceparent": f"00-{TRACE_ID}-{CLIENT_SPAN}-01", "X-Request-Id": "mine"}
    response, tokens, answer_id = await moved_answer(fleet, first, headers)
    assert tokens == answer(PROMPT, NUM_TOKENS, LIMITS)

    # the other gateway asks the one that remembers; by each of the request's names, with kervan's own command
    stream_id = response.headers["x-kervan-stream-id"]
    for name in (answer_id, stream_id, "mine"):
        done = await asyncio.to_thread(CliRunner().invoke, explain, [name, "--url", second, "--json"])
        assert done.exit_code == 0, done.output
        told = json.loads(done.stdout)
        assert (told["gateway"], told["status"], told["stream_id"]) == ("gw-1", 200, stream_id)
    (stream,) = told["streams"]
    (move,) = stream["moves"]
    assert (move["reason"], move["source"], move["target"]) == ("lost", "a", "b")
    assert 0 < move["after_tokens"] <= NUM_TOKENS and move["prefilled_tokens"] == len(PROMPT) + move["after_tokens"]
    assert move["pause_s"] > 0.02
    parts = [part["part"] for part in stream["parts"]]
    assert parts == ["queue", "replica queue", "prefill", "decode", "move", "decode"]
    assert (stream["output_tokens"], stream["ended"]) == (NUM_TOKENS, "length")
    before_s = sum(part["seconds"] for part in told["before"])
    within_s = sum(part["seconds"] for part in stream["parts"])
    assert before_s + within_s + told["delivery_s"] == pytest.approx(told["seconds"], abs=1e-3)
    text = (await asyncio.to_thread(CliRunner().invoke, explain, [answer_id, "--url", first])).stdout
    assert f"moved (lost) from {move['source']} to {move['target']} after" in text
    assert "tokens computed again" in text

    # a request that is refused, one without a parent, and one that nobody knows
    async with httpx.AsyncClient(timeout=60) as client:
        bad = await client.post(f"{first}/v1/completions", json={"prompt": "x", "model": "none"})
        assert bad.status_code == 404
        unknown = await client.get(f"{first}/kervan/requests/nobody")
        assert (unknown.status_code, "remembers a request 'nobody'" in unknown.text) == (404, True)
    missing = await asyncio.to_thread(CliRunner().invoke, explain, ["nobody", "--url", first])
    assert isinstance(missing.exception, FleetError)

    await fleet.gateways.pop(0).stop()  # which sends what is left
    check_trace(collector, told, move, stream_id)
    alone = {span.trace_id for span in collector.spans if span.attributes.get("http.response.status_code") == 404}
    assert len(alone) == 1 and TRACE_ID not in alone


def check_trace(collector: Collector, told: dict[str, Any], move: dict[str, Any], stream_id: str) -> None:
    spans = collector.of(TRACE_ID)
    by_name: dict[str, list[Span]] = {}
    for span in spans:
        by_name.setdefault(span.name, []).append(span)
    (request,) = by_name["POST /v1/completions"]
    assert (request.parent_id, request.service) == (CLIENT_SPAN, "kervan")
    assert request.attributes["kervan.stream_id"] == stream_id
    (stream,) = by_name["stream"]
    assert stream.parent_id == request.span_id
    assert {span.parent_id for name in ("prefill", "decode", "move") for span in by_name[name]} == {stream.span_id}
    (moved,) = by_name["move"]
    assert moved.attributes["kervan.move.reason"] == "lost"
    assert (moved.attributes["kervan.move.from"], moved.attributes["kervan.move.to"]) == (
        move["source"],
        move["target"],
    )
    assert moved.end_s - moved.start_s == pytest.approx(move["pause_s"], abs=1e-3)
    assert all(request.start_s - 1e-3 <= s.start_s <= s.end_s <= request.end_s + 1e-3 for s in [stream, moved])
    # vLLM's own span of the request, under the same trace, below kervan's
    (vllms,) = by_name["llm_request"]
    assert (vllms.parent_id, vllms.attributes["gen_ai.usage.completion_tokens"]) == (request.span_id, NUM_TOKENS)
    assert not any(span.is_error for span in spans)
