"""Traces and `kervan explain` of a real gateway with vLLM's app, over processes of twins, to a real OTLP receiver."""

import asyncio
import dataclasses
import json
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from harness.live import until
from harness.otlp import Collector, Span, collecting
from harness.shared_fleet import Models
from harness.twin_bench import LIMITS, SECRET
from harness.twin_server import SHAPE
from harness.warm_place import WarmPlace

from kervan.cli.explain import explain
from kervan.config.fault import Fault
from kervan.config.fleet import FleetConfig
from kervan.errors import FleetError
from kervan.fleet.control import EngineSpec
from kervan.fleet.directory import ReplicaEntry, Snapshot
from kervan.fleet.process import TWIN_ENGINE, EngineProcess
from kervan.gateway.process import GatewayProcess
from kervan.gateway.server import Gateway, GatewayConfig
from kervan.ports import free_port
from kervan.twin.replica import TwinSpec
from kervan.twin.token_engine import StepTiming, TwinSettings, answer

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
CLIENT_SPAN = "00f067aa0ba902b7"
TIMING = StepTiming(base_s=0.02, prefill_token_s=1e-5, sequence_s=0.0, context_token_s=0.0)
PROMPT, NUM_TOKENS, CRASH_AFTER = [7, 8, 9], 40, 20


def gateway_config(name: str, fleet: FleetConfig, replay_s: float = 0.0) -> GatewayConfig:
    return GatewayConfig(
        gateway_id=name, node="127.0.0.1", engine_argv=fleet.engine_argv, secret=SECRET,
        host="127.0.0.1", port=free_port(), internal_host="127.0.0.1", public_host="127.0.0.1",
        max_queued_streams=64, hold_timeout_s=30.0, stop_timeout_s=5.0, opens_when_attached=False,
        is_twin=fleet.engine == "twin", shared_port=False, fleet_name="traced", models=(), replay_s=replay_s,
        replay_max_bytes=1 << 24, remembered_requests=100, otlp=fleet.traces_url,
    )  # fmt: skip


class TracedFleet:
    """Two twins and two gateways, of which the first traces."""

    def __init__(self, model: Path, scratch: Path, otlp: str, *, replay_s: float = 0.0) -> None:
        self.twins = {
            name: EngineProcess(
                TwinSpec(name, "127.0.0.1", SECRET, TwinSettings(TIMING, LIMITS)),
                log_path=scratch / f"{name}.log",
                module=TWIN_ENGINE,
            )
            for name in ("a", "b")
        }
        plain = FleetConfig(model=str(model), engine_args={"max_model_len": 2048}, engine="twin", gpu="H200")
        configs = (dataclasses.replace(plain, otlp=otlp), plain)
        self.gateways = [
            Gateway(gateway_config(f"gw-{number}", config, replay_s)) for number, config in enumerate(configs, 1)
        ]

    def follow(self, *names: str) -> None:
        """The directory lists these twins."""
        replicas = [
            ReplicaEntry(
                name, "on-demand", "127.0.0.1", twin.pid, "ready", twin.ready.address, public_key=twin.ready.public_key
            )
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


@asynccontextmanager
async def running(fleet: TracedFleet) -> AsyncIterator[TracedFleet]:
    try:
        await fleet.start()
        yield fleet
    finally:
        await fleet.stop()


@pytest.fixture
def shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model for twins."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SHAPE))
    return tmp_path / "model"


@pytest.fixture
async def fleet(collector: Collector, shape: Path, tmp_path: Path) -> AsyncIterator[TracedFleet]:
    async with running(TracedFleet(shape, tmp_path, collector.url)) as fleet:
        yield fleet


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


OTHER_TRACE = "a" * 32


async def test_a_client_that_comes_back_to_its_stream_is_in_the_trace_of_the_request(
    collector: Collector, shape: Path, tmp_path: Path
) -> None:
    mine, again = "1" * 32, {"traceparent": f"00-{OTHER_TRACE}-{CLIENT_SPAN}-01"}
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "stream": True, "ignore_eos": True, "return_token_ids": True}

    async def read(response: httpx.Response, most: int = 1000) -> tuple[list[int], str]:
        tokens: list[int] = []
        last = ""
        async for line in response.aiter_lines():
            last = line.removeprefix("id: ") if line.startswith("id: ") else last
            if line.startswith("data: {"):
                tokens += [token for choice in json.loads(line[6:])["choices"] for token in choice["token_ids"] or ()]
            if not line and len(tokens) >= most:
                break
        return tokens, last

    async with running(TracedFleet(shape, tmp_path, collector.url, replay_s=60)) as fleet:
        first, second = (gateway.entry().url for gateway in fleet.gateways)
        async with httpx.AsyncClient(timeout=60) as client:
            body["model"] = (await client.get(f"{first}/v1/models")).json()["data"][0]["id"]
            headers = {"traceparent": f"00-{mine}-{CLIENT_SPAN}-01"}
            async with client.stream("POST", f"{first}/v1/completions", json=body, headers=headers) as response:
                tokens, last = await read(response, 10)
                stream_id = response.headers["x-kervan-stream-id"]
            path = f"{second}/v1/streams/{stream_id}"  # the other gateway passes it on to the one that has it
            async with client.stream("GET", path, headers={**again, "last-event-id": last}) as response:
                rest, _ = await read(response)
        assert tokens + rest == answer(PROMPT, NUM_TOKENS, LIMITS)
        done = await asyncio.to_thread(CliRunner().invoke, explain, [stream_id, "--url", first])
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("POST /v1/completions at") and "GET /v1/streams/{id} at" in done.stdout
        assert "replay" in done.stdout
        await fleet.gateways.pop(0).stop()  # which sends what is left
    by_name = {span.name: span for span in collector.of(mine) if span.service == "kervan"}
    request, came_back = by_name["POST /v1/completions"], by_name["GET /v1/streams/{id}"]
    assert request.parent_id == CLIENT_SPAN
    assert (came_back.parent_id, came_back.links) == (request.span_id, (OTHER_TRACE,))
    assert came_back.attributes["kervan.stream_id"] == request.attributes["kervan.stream_id"] == stream_id
    assert by_name["replay"].trace_id == mine
    assert [span for span in collector.spans if span.trace_id == OTHER_TRACE] == []


async def test_with_vllm_its_own_spans_are_in_the_trace_of_a_stream_that_moves(
    collector: Collector, models: Models, tmp_path: Path, warm_place: WarmPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", warm_place.directory)
    mine, num_tokens = "2" * 32, 120
    arguments = {"max_model_len": 256, "dtype": "float32", "enforce_eager": True}
    fleet = FleetConfig(model=str(models.demo), engine_args=arguments, otlp=collector.url)
    engines = {
        name: EngineProcess(
            EngineSpec(name, list(fleet.engine_argv), "127.0.0.1", SECRET), log_path=tmp_path / f"{name}.log",
            env=warm_place.environment, fork_for_pid=os.getpid(),
        )
        for name in ("a", "b")
    }  # fmt: skip
    # in a process of its own, as in a fleet: vLLM's tracer is one for the whole process
    config = dataclasses.replace(gateway_config("gw-v", fleet), opens_when_attached=True)
    gateway = GatewayProcess(config, log_path=tmp_path / "gateway.log")

    def follow(name: str) -> None:
        ready = engines[name].ready
        assert ready is not None
        entry = ReplicaEntry(
            name, "on-demand", "127.0.0.1", engines[name].pid, "ready", ready.address, public_key=ready.public_key
        )
        gateway.update(Snapshot(1, [entry], [], []))

    try:
        await until(lambda: all(engine.ready or engine.failure for engine in engines.values()))
        follow("a")
        await gateway.start((), env=warm_place.environment, fork_for_pid=os.getpid())
        url = f"http://127.0.0.1:{gateway.config.port}"
        body: dict[str, Any] = {"prompt": "What is a caravan?", "max_tokens": num_tokens, "stream": True,
                                "ignore_eos": True, "return_token_ids": True, "temperature": 0}  # fmt: skip
        num_got, is_killed = 0, False
        async with httpx.AsyncClient(timeout=120) as client:
            body["model"] = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
            headers = {"traceparent": f"00-{mine}-{CLIENT_SPAN}-01"}
            async with client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        num_got += sum(len(c["token_ids"] or ()) for c in json.loads(line[6:])["choices"])
                    if num_got >= 5 and not is_killed:
                        is_killed = True
                        engines["a"].kill()
                        follow("b")
        assert num_got == num_tokens
    finally:
        await gateway.stop()  # which sends what is left
        for engine in engines.values():
            engine.kill()
    spans = collector.of(mine)
    (request,) = (span for span in spans if span.name == "POST /v1/completions")
    (move,) = (span for span in spans if span.name == "move")
    assert (move.attributes["kervan.move.from"], move.attributes["kervan.move.to"]) == ("a", "b")
    (llm,) = (span for span in spans if span.name == "llm_request")
    assert (llm.service != "kervan", llm.parent_id) == (True, request.span_id)
    assert llm.attributes["gen_ai.usage.completion_tokens"] == num_tokens
    assert llm.start_s <= move.start_s <= move.end_s <= llm.end_s + 1e-3
    log = (tmp_path / "b.log").read_text(errors="replace")
    assert f"goes on here after {move.attributes['kervan.move.after_tokens']} tokens" in log
