"""The fleet client against toy replicas in this process: real sockets, real frames, no engine.

A toy replica's next token is a function of all tokens before it (`next_token`), so a token that is lost, doubled or
computed from a wrong prefix changes every later one. Replicas step when the test says so, or by themselves (`run`).
"""

import asyncio
import contextlib
import dataclasses
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from kervan.errors import EngineError
from kervan.fleet import client as client_module
from kervan.fleet import link as link_module
from kervan.fleet import stalls, wire
from kervan.fleet.client import FleetClient
from kervan.fleet.evacuees import PrefillSpeed
from kervan.fleet.journal import Stream
from kervan.fleet.link import Link, Member
from kervan.policy import quarantine
from kervan.policy.output_length import MIN_ANSWERS

SECRET = "s3cret"
VERSION = "toy-1"
POISON = 666  # a prompt that holds it kills its replica at the first step
DEADLINE_S = 20.0

ADD, ABORT, UTILITY = b"\x00", b"\x01", b"\x02"


# ---- a toy engine


def next_token(context: Sequence[int]) -> int:
    return (31 * len(context) + 17 * sum(context) + context[-1]) % 601


def answer_to(prompt: Sequence[int], num_tokens: int) -> list[int]:
    context = list(prompt)
    for _ in range(num_tokens):
        context.append(next_token(context))
    return context[len(prompt) :]


class Request(msgspec.Struct):
    request_id: str
    prompt: list[int]
    max_tokens: int
    is_resumable: bool = False


class Result(msgspec.Struct):
    result: Any


class UtilityOutput(msgspec.Struct):
    call_id: int
    failure_message: str | None = None
    result: Result | None = None


class Output(msgspec.Struct):
    request_id: str
    new_token_ids: list[int]
    finish_reason: str | None = None
    is_restored: bool = False


class Outputs(msgspec.Struct):
    outputs: list[Output] = []
    scheduler_stats: dict[str, int] | None = None
    utility_output: UtilityOutput | None = None
    timestamp: float = 0.0


class ToyCodec:
    """Implements `kervan.fleet.codec.Codec`."""

    def __init__(self, engine_version: str = VERSION):
        self.engine_version = engine_version
        self.layouts: dict[str, list[str]] = {}

    def describe(self, request: Request) -> Stream:
        return Stream(
            request.request_id,
            request,
            prompt_tokens=len(request.prompt),
            max_output_tokens=request.max_tokens,
            is_movable=not request.is_resumable,
        )

    def encode_add(self, stream: Stream) -> list[bytes]:
        prompt = [*stream.request.prompt, *stream.generated]
        add = Request(stream.wire_id, prompt, stream.max_output_tokens - len(stream.generated))
        return [ADD, msgspec.msgpack.encode(add)]

    def encode_abort(self, wire_ids: list[str]) -> list[bytes]:
        return [ABORT, msgspec.msgpack.encode(wire_ids)]

    def encode_utility(self, call_id: int, method: str, args: tuple[Any, ...]) -> list[bytes]:
        return [UTILITY, msgspec.msgpack.encode((call_id, method, args))]

    def decode(self, frames: Sequence[zmq.Frame]) -> Outputs:
        return msgspec.msgpack.decode(frames[0].bytes, type=Outputs)

    def restore(self, output: Output, stream: Stream) -> None:
        output.request_id = stream.request_id
        output.is_restored = True

    def failure(self, request_id: str) -> Outputs:
        return Outputs([Output(request_id, [], "error")])

    def record(self, output: Output) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(output, request_id=""))

    def recorded(self, data: bytes, request_id: str) -> Outputs:
        return Outputs([msgspec.structs.replace(msgspec.msgpack.decode(data, type=Output), request_id=request_id)])


class ToyReplica:
    """Binds the two sockets and speaks the wire; one token per stream and step."""

    def __init__(
        self, replica_id: str, *, secret: str = SECRET, engine_version: str = VERSION, clock_ahead_s: float = 0
    ):
        self.replica_id = replica_id
        self.secret = secret
        self.engine_version = engine_version
        self.clock_ahead_s = clock_ahead_s
        self.running: dict[str, Request] = {}
        self.aborted: list[str] = []
        self.added: list[Request] = []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.call_failure: str | None = None
        self.is_silent_to_calls = False
        self.is_draining = False
        self.is_alive = True
        self.other_tokens = 0
        self.obeys_aborts = True
        self.last_ping: wire.Ping | None = None
        self.num_outputs = 0
        self.num_to_lose = 0
        self.stalled_s = 0.0
        self._sessions: set[bytes] = set()
        self._subscribed: set[bytes] = set()
        self._context = zmq.asyncio.Context()
        self._input, self.address = self._bind()
        self._output, self._output_address = self._bind()
        self._tasks = [asyncio.create_task(self._serve_input()), asyncio.create_task(self._serve_output())]

    def _bind(self) -> tuple[zmq.asyncio.Socket, str]:
        router = self._context.socket(zmq.ROUTER)
        wire.configure(router)
        router.bind("tcp://127.0.0.1:0")
        return router, router.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def member(self) -> Member:
        return Member(self.replica_id, self.address)

    async def _serve_input(self) -> None:
        while True:
            identity, kind, *payload = await self._input.recv_multipart()
            if kind == wire.HELLO:
                await self._input.send_multipart([identity, *self._greet(identity, payload[0])])
            elif identity not in self._sessions:
                continue
            elif kind == wire.PING:
                self.last_ping = msgspec.msgpack.decode(payload[0], type=wire.Ping)
                await self._input.send_multipart([identity, wire.PONG, self._pong()])
            elif kind == ADD:
                request = msgspec.msgpack.decode(payload[0], type=Request)
                self.added.append(request)
                self.running[request.request_id] = request
            elif kind == ABORT:
                for wire_id in msgspec.msgpack.decode(payload[0], type=list[str]):
                    self.aborted.append(wire_id)
                    if self.obeys_aborts:
                        self.running.pop(wire_id, None)
            elif kind == UTILITY:
                await self._call(*msgspec.msgpack.decode(payload[0]))

    def _greet(self, identity: bytes, payload: bytes) -> tuple[bytes, bytes]:
        hello = msgspec.msgpack.decode(payload, type=wire.Hello)
        refusal = wire.refusal(hello, engine_version=self.engine_version, secret=self.secret)
        if refusal is not None:
            return wire.REFUSED, refusal.encode()
        self._sessions = {identity}  # one client, so one count of outputs; a new session starts it again
        self._subscribed.clear()
        self.running.clear()
        self.num_outputs = 0
        facts = wire.EngineFacts(max_model_len=4096, num_gpu_blocks=100, block_size=16, max_num_seqs=8)
        welcome = wire.Welcome(
            self.replica_id, self.engine_version, self._output_address, time.monotonic() + self.clock_ahead_s, facts
        )
        return wire.WELCOME, msgspec.msgpack.encode(welcome)

    async def _serve_output(self) -> None:
        while True:
            identity, _ = await self._output.recv_multipart()
            self._subscribed.add(identity)
            await self._output.send_multipart([identity, wire.SUBSCRIBED])

    def _pong(self) -> bytes:
        load = wire.Pong(
            len(self.running), 0, 0.0, self.other_tokens, self.is_draining, self.num_outputs, stalled_s=self.stalled_s
        )
        return msgspec.msgpack.encode(load)

    async def _call(self, call_id: int, method: str, args: list[Any]) -> None:
        self.calls.append((method, tuple(args)))
        if self.is_silent_to_calls:
            return
        if self.call_failure is not None:
            answer = UtilityOutput(call_id, failure_message=self.call_failure)
        else:
            answer = UtilityOutput(call_id, result=Result(f"{self.replica_id} did {method}"))
        await self._emit(Outputs(utility_output=answer))

    async def _emit(self, outputs: Outputs) -> None:
        outputs.timestamp = time.monotonic() + self.clock_ahead_s
        self.num_outputs += 1
        if self.num_to_lose:  # as a ROUTER does while a connection is broken
            self.num_to_lose -= 1
            return
        number = wire.encode_number(self.num_outputs)
        for identity in self._subscribed:
            await self._output.send_multipart([identity, number, msgspec.msgpack.encode(outputs)])

    async def break_output_connection(self) -> None:
        """The connection ends and a new one can be made to the same address."""
        self._tasks.pop(1).cancel()
        self._output.close(0)
        self._output = self._context.socket(zmq.ROUTER)
        wire.configure(self._output)
        while True:
            try:
                self._output.bind(self._output_address)
                break
            except zmq.ZMQError:  # ZMQ closes the old socket in a thread of its own
                await asyncio.sleep(0.001)
        self._tasks.insert(1, asyncio.create_task(self._serve_output()))

    async def step(self, num_steps: int = 1) -> None:
        """One token for each running stream per step, in one message; poison kills the replica instead."""
        for _ in range(num_steps):
            if any(POISON in request.prompt for request in self.running.values()):
                self.kill()
                return
            outputs = []
            for wire_id, request in list(self.running.items()):
                token = next_token(request.prompt)
                request.prompt.append(token)
                request.max_tokens -= 1
                is_last = request.max_tokens <= 0
                outputs.append(Output(wire_id, [token], "length" if is_last else None))
                if is_last:
                    del self.running[wire_id]
            if outputs:
                await self._emit(Outputs(outputs))

    def run(self) -> None:
        """Step whenever there is work, until killed."""

        async def forever() -> None:
            while self.is_alive:
                await self.step()
                await asyncio.sleep(0)

        self._tasks.append(asyncio.create_task(forever()))

    async def drain(self, is_draining: bool = True) -> None:
        self.is_draining = is_draining
        for identity in self._sessions:
            await self._input.send_multipart([identity, wire.PONG, self._pong()])

    async def say_dead(self) -> None:
        for identity in self._subscribed:
            await self._output.send_multipart([identity, wire.ENGINE_DEAD])

    def kill(self) -> None:
        """As kill -9: the sockets close, nothing is said."""
        self.is_alive = False
        for task in self._tasks:
            task.cancel()
        self._context.destroy(linger=0)


# ---- the test bench


async def until(condition: Callable[[], Any], what: str = "") -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, what or "the condition never came true"
        await asyncio.sleep(0.001)


class Bench:
    """A client, the replicas it may know, and what came out of it."""

    def __init__(self, client: FleetClient):
        self.client = client
        self.replicas: dict[str, ToyReplica] = {}
        self.tokens: dict[str, list[int]] = {}
        self.endings: dict[str, list[str]] = {}
        self.expected: dict[str, list[int]] = {}
        self.messages: list[Outputs] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        while True:
            outputs = await self.client.outputs.get()
            self.messages.append(outputs)
            for output in outputs.outputs:
                self.tokens.setdefault(output.request_id, []).extend(output.new_token_ids)
                if output.finish_reason is not None:
                    self.endings.setdefault(output.request_id, []).append(output.finish_reason)

    def link(self, replica: ToyReplica) -> Link:
        return next(link for link in self.client.links if link.replica_id == replica.replica_id)

    async def start(self, replica_id: str, *, is_awaited: bool = True, **settings: Any) -> ToyReplica:
        replica = self.replicas[replica_id] = ToyReplica(replica_id, **settings)
        self.follow()
        if is_awaited:
            await until(lambda: any(link.replica_id == replica_id for link in self.client.links))
        return replica

    def follow(self) -> None:
        """Let the client know the living replicas, as the directory would."""
        self.client.set_members([replica.member for replica in self.replicas.values() if replica.is_alive])

    async def kill(self, replica: ToyReplica) -> None:
        replica.kill()
        await self.lost(replica)

    async def lost(self, replica: ToyReplica) -> None:
        await until(lambda: all(link.member != replica.member for link in self.client.links))
        self.follow()

    async def add(self, request_id: str, prompt: list[int] | None = None, max_tokens: int = 6, **more: Any) -> None:
        prompt = prompt or [1, 2, 3]
        self.expected[request_id] = answer_to(prompt, max_tokens)
        await self.client.add(Request(request_id, list(prompt), max_tokens, **more))

    async def placed(self, replica: ToyReplica, *wire_ids: str) -> None:
        await until(lambda: set(replica.running) == set(wire_ids), f"{replica.replica_id} has not {wire_ids}")

    async def got(self, request_id: str, num_tokens: int) -> None:
        await until(lambda: len(self.tokens.get(request_id, ())) >= num_tokens)

    async def steps(self, replica: ToyReplica, num_steps: int) -> None:
        """Step, and wait until the client has what came of it."""
        wanted = {i: len(self.tokens.get(i.partition("~")[0], ())) + num_steps for i in replica.running}
        await replica.step(num_steps)
        for wire_id, num_tokens in wanted.items():
            request_id = wire_id.partition("~")[0]
            await self.got(request_id, min(num_tokens, len(self.expected[request_id])))

    async def ended(self, *request_ids: str) -> None:
        await until(lambda: all(i in self.endings for i in request_ids), f"{request_ids} did not all end")

    async def finished(self, *request_ids: str) -> None:
        """Step all replicas until these are finished; whole, and once."""

        async def step_all() -> None:
            while True:
                for replica in list(self.replicas.values()):
                    if replica.is_alive:
                        await replica.step()
                await asyncio.sleep(0)

        stepping = asyncio.create_task(step_all())
        try:
            await self.ended(*request_ids)
        finally:
            stepping.cancel()
        for request_id in request_ids:
            assert self.tokens[request_id] == self.expected[request_id]
            assert self.endings[request_id] == ["length"]

    def failed(self, request_id: str) -> bool:
        return self.endings.get(request_id) == ["error"]

    def check_integrity(self) -> None:
        """Nothing is left of streams that are over."""
        assert self.client.num_streams == 0
        assert self.client.num_held == 0
        for link in self.client.links:
            assert (link.replica_id, link.load.own_tokens, link.load.num_suspects) == (link.replica_id, 0, 0)
            assert link.streams == {}
            assert link.calls == {}
        assert all(len(endings) == 1 for endings in self.endings.values())

    async def close(self) -> None:
        self._reader.cancel()
        await self.client.close()
        for replica in self.replicas.values():
            if replica.is_alive:
                replica.kill()


@contextlib.asynccontextmanager
async def make_bench(**settings: Any) -> AsyncIterator[Bench]:
    """A bench whose integrity is checked at the end."""
    codec = settings.pop("codec", None) or ToyCodec()
    bench = Bench(FleetClient(codec, secret=settings.pop("secret", SECRET), **settings))
    try:
        yield bench
        bench.check_integrity()
    finally:
        await bench.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RECONNECT_PERIOD_S", 0.01)
    monkeypatch.setattr(wire, "PING_PERIOD_S", 0.02)
    monkeypatch.setattr(stalls, "PERIOD_S", 0.02)
    monkeypatch.setattr(quarantine, "RETURN_WAIT_S", 0.2)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    async with make_bench() as bench:
        yield bench


# ---- placement


def replace_risky(member: Member) -> Member:
    return dataclasses.replace(member, risky_for_s=math.inf)


async def test_a_stream_is_placed_answered_and_forgotten(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[5, 6], max_tokens=4)
    await bench.placed(a, "s")
    assert bench.client.num_streams == 1
    assert bench.link(a).load.own_tokens == 6  # 2 prompt + 4 output
    await bench.finished("s")
    assert a.added == [Request("s", [5, 6, *bench.expected["s"]], 0)]
    assert a.aborted == []


async def test_outstanding_tokens_fall_with_the_prompt_and_with_each_token(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[1] * 100, max_tokens=10)
    await bench.placed(a, "s")
    seen = [bench.link(a).load.own_tokens]
    for _ in range(3):
        await bench.steps(a, 1)
        seen.append(bench.link(a).load.own_tokens)
    assert seen == [110, 9, 8, 7]
    await bench.finished("s")


async def test_at_its_first_token_a_moved_stream_was_prefilled_with_what_it_had_generated(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled: list[int] = []
    monkeypatch.setattr(PrefillSpeed, "observe", lambda _, tokens, ttft_s: prefilled.append(tokens))
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", prompt=[1] * 100, max_tokens=10)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    seen = [bench.link(b).load.own_tokens]
    for _ in range(2):
        await bench.steps(b, 1)
        seen.append(bench.link(b).load.own_tokens)
    assert prefilled == [100, 103]
    assert seen == [110, 6, 5]  # 103 queued and 7 to come
    await bench.finished("s")


async def test_streams_go_where_the_fewest_tokens_are_outstanding(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    # tokens (a, b):     (0, 0)        (100, 0)      (100, 40)      (100, 80)      (100, 120)
    for i, (length, output) in enumerate([(90, 10), (30, 10), (30, 10), (30, 10), (10, 5)]):
        await bench.add(f"s{i}", prompt=[1] * length, max_tokens=output)
    await bench.placed(a, "s0", "s4")
    await bench.placed(b, "s1", "s2", "s3")
    await bench.finished(*(f"s{i}" for i in range(5)))


async def test_other_gateways_load_counts(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    a.other_tokens = 500
    await until(lambda: bench.link(a).pong.other_tokens == 500)
    await bench.add("s")
    await bench.placed(b, "s")
    await until(lambda: b.last_ping == wire.Ping(9), "the replica learns what is outstanding: 3 prompt + 6 output")
    await bench.finished("s")


async def test_long_answers_pass_a_risky_replica_over_for_as_long_as_it_is_one(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    bench.client.set_members([replace_risky(a.member), b.member])
    before_s = bench.link(a).pong_s
    await until(lambda: bench.link(a).pong_s > before_s + 0.05, "signs of life do not end it")
    await bench.add("short", max_tokens=1023)
    await bench.placed(a, "short")
    await bench.add("short2", prompt=[1] * 200, max_tokens=1023)
    await bench.placed(b, "short2")  # a: 1026, b: 1223
    await bench.add("long", max_tokens=1024)
    await bench.placed(b, "short2", "long")
    bench.client.set_members([dataclasses.replace(a.member, risky_for_s=0.01), b.member])
    await until(lambda: not bench.link(a).load.is_risky)
    await bench.add("long2", max_tokens=1024)
    await bench.placed(a, "short", "long2")
    await bench.finished("short", "short2", "long", "long2")


async def test_answers_that_may_be_long_and_never_are_go_anywhere(bench: Bench) -> None:
    a = await bench.start("a")
    for i in range(MIN_ANSWERS):
        await bench.add(f"s{i}", max_tokens=4)
    await bench.finished(*(f"s{i}" for i in range(MIN_ANSWERS)))
    await bench.start("b")
    bench.client.set_members([replace_risky(a.member), bench.replicas["b"].member])
    await bench.add("s", max_tokens=2000)  # as many as there may be; those before it had 4
    await bench.placed(a, "s")
    await bench.finished("s")


async def test_capacity_is_the_sum_over_replicas_that_take_work(bench: Bench) -> None:
    assert bench.client.capacity_streams == 0
    await bench.start("a")
    b = await bench.start("b")
    assert bench.client.capacity_streams == 16
    await b.drain()
    await until(lambda: bench.client.capacity_streams == 8)


async def test_the_completion_rate_is_known(bench: Bench) -> None:
    await bench.start("a")
    assert bench.client.completed_per_s == 0
    for i in range(10):
        await bench.add(f"s{i}", max_tokens=1)
    await bench.finished(*(f"s{i}" for i in range(10)))
    assert 0.5 < bench.client.completed_per_s <= 1.0  # ten streams, averaged over about 10 s


async def test_timestamps_are_shifted_to_this_hosts_clock(bench: Bench) -> None:
    begin_s = time.monotonic()
    await bench.start("a", clock_ahead_s=5000.0)
    await bench.add("s", max_tokens=1)
    await bench.finished("s")
    stamps = [message.timestamp for message in bench.messages]
    assert stamps
    assert all(begin_s - 1 <= stamp <= time.monotonic() + 1 for stamp in stamps)


# ---- loss of a replica


async def test_a_killed_replicas_stream_goes_on_elsewhere_without_a_seam(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", prompt=[7, 8, 9], max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    assert b.added == [Request("s~1", [7, 8, 9, *bench.expected["s"][:3]], 5)]
    await bench.finished("s")
    assert bench.client.counts.moved == 1
    assert bench.client.counts.lost_replicas == 1


async def test_a_replicas_streams_are_counted_beyond_its_end(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway tells its counts once a second: the last ones of a replica that is gone must not be lost."""
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.finished("s")
    await bench.add("t", max_tokens=8)
    await bench.placed(a, "t")
    await bench.kill(a)
    await bench.placed(b, "t~1")
    await bench.finished("t")
    counts = {name: (told.num_served, told.num_moved) for name, told in bench.client.traffic().items()}
    assert counts == {"a": (1, 1), "b": (1, 0)}
    monkeypatch.setattr(client_module, "KEEP_TALLY_S", 0.0)
    assert set(bench.client.traffic()) == {"b"}


async def test_only_moved_streams_are_restored(bench: Bench) -> None:
    a, _ = await bench.start("a"), await bench.start("b")
    await bench.add("moved", max_tokens=4)
    await bench.add("stays", max_tokens=4)
    await bench.steps(a, 1)
    await bench.kill(a)
    await bench.finished("moved", "stays")
    restored = {o.request_id for message in bench.messages for o in message.outputs if o.is_restored}
    assert restored == {"moved"}


async def test_an_engine_that_says_it_is_dead_is_left_at_once(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await a.say_dead()
    await bench.placed(b, "s~1")
    a.kill()
    await bench.lost(a)
    await bench.finished("s")


@pytest.mark.parametrize("fault", ["connection", "middle", "tail"])
async def test_lost_outputs_are_noticed_and_their_streams_move(
    bench: Bench, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ROUTER drops what it cannot route without a word, for example while a connection breaks and comes back."""
    monkeypatch.setattr(wire, "OUTPUT_TIMEOUT_S", 0.2)
    a = await bench.start("a")
    await bench.add("r1", max_tokens=12)
    await bench.placed(a, "r1")
    await bench.steps(a, 3)
    link = bench.link(a)
    if fault == "connection":
        await a.break_output_connection()
    else:
        a.num_to_lose = 1
        await a.step()
        if fault == "middle":
            await a.step()
    await until(lambda: bench.client.links and bench.link(a) is not link, "the link is made again")
    await bench.finished("r1")
    assert bench.client.counts.moved == 1


async def test_a_stream_survives_one_replica_after_another(bench: Bench) -> None:
    await bench.add("s", max_tokens=10)
    for i in range(5):
        replica = await bench.start(f"r{i}")
        await until(lambda replica=replica: replica.running)
        await bench.steps(replica, 2)
        if i < 4:
            await bench.kill(replica)
    await bench.finished("s")
    assert bench.client.counts.moved == 4


async def test_late_outputs_of_an_earlier_placement_on_the_same_replica_are_ignored(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=12)
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    a.obeys_aborts = False  # a keeps stepping what it was told to forget
    await a.drain()
    await bench.placed(b, "s~1")
    await bench.steps(b, 2)
    await a.drain(False)
    await until(lambda: not bench.link(a).pong.is_draining)
    await bench.kill(b)
    await bench.placed(a, "s", "s~2")
    await bench.finished("s")
    assert bench.client.counts.late_outputs >= 1
    assert bench.client.counts.moved == 2


async def test_what_cannot_be_moved_is_failed(bench: Bench) -> None:
    a, _ = await bench.start("a"), await bench.start("b")
    await bench.add("audio", is_resumable=True)
    await bench.placed(a, "audio")
    await bench.steps(a, 1)
    await bench.kill(a)
    await bench.ended("audio")
    assert bench.failed("audio")


async def test_a_further_part_of_an_input_goes_where_the_first_went(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("audio", prompt=[1] * 50, is_resumable=True)
    await bench.placed(a, "audio")
    await bench.client.add(Request("audio", [2] * 50, 3, is_resumable=True))
    await until(lambda: len(a.added) == 2)
    assert b.added == []
    assert bench.client.num_streams == 1
    await bench.client.abort(["audio"])
    await bench.placed(a)


async def test_a_replica_that_returns_at_its_address_is_linked_again(bench: Bench) -> None:
    a = await bench.start("a")
    first = bench.link(a)
    await a.say_dead()
    await until(lambda: bench.client.links and bench.link(a) is not first)
    await bench.add("s")
    await bench.finished("s")


async def test_a_member_that_is_no_longer_listed_keeps_its_streams(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    bench.client.set_members([])  # the directory restarted empty
    await bench.add("t")
    await bench.finished("s", "t")


async def test_a_client_that_closes_moves_nothing() -> None:
    bench = Bench(FleetClient(ToyCodec(), secret=SECRET))
    try:
        a, b = await bench.start("a"), await bench.start("b")
        a.is_silent_to_calls = b.is_silent_to_calls = True
        await bench.add("s")
        await bench.add("t")
        await bench.placed(a, "s")
        await bench.placed(b, "t")
        call = asyncio.create_task(bench.client.call("sleep", ()))
        await until(lambda: a.calls and b.calls)
        await bench.client.close()
        with pytest.raises(EngineError, match="ended before a replica answered sleep"):
            await call
        assert bench.client.links == []
        assert (bench.client.counts.moved, bench.client.counts.lost_replicas, bench.endings) == (0, 0, {})
    finally:
        await bench.close()


# ---- held streams


async def test_without_a_replica_a_stream_is_held_and_placed_when_one_links(bench: Bench) -> None:
    for name in ("s", "t"):
        await bench.add(name)
    assert bench.client.num_held == 2
    a = await bench.start("a")
    await bench.placed(a, "s", "t")
    assert bench.client.num_held == 0
    await bench.finished("s", "t")


async def test_a_lost_fleet_holds_its_streams_for_the_next_replica(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await bench.kill(a)
    await until(lambda: bench.client.num_held == 1)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await bench.finished("s")


async def test_a_stream_held_too_long_is_failed() -> None:
    async with make_bench(hold_timeout_s=0.0) as bench:
        await bench.add("s")
        await bench.ended("s")
        assert bench.failed("s")
        assert bench.client.counts.expired == 1
        assert bench.client.num_held == 0


async def test_a_held_stream_can_be_aborted(bench: Bench) -> None:
    await bench.add("s")
    await bench.client.abort(["s"])
    assert (bench.client.num_held, bench.client.num_streams) == (0, 0)
    a = await bench.start("a")
    await bench.add("t")
    await bench.placed(a, "t")
    await bench.finished("t")
    assert [request.request_id for request in a.added] == ["t"]


# ---- standing still


async def test_streams_leave_a_replica_that_stands_still_and_it_may_go_on(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    a.stalled_s = 100.0
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await bench.add("t")  # though `a` has less to do
    await bench.placed(b, "s~1", "t")
    a.stalled_s = 0.0
    await until(lambda: not bench.link(a).load.is_stalled)
    await bench.add("u")
    await bench.placed(a, "u")
    await bench.finished("s", "t", "u")
    assert (bench.client.counts.moved, bench.client.counts.lost_replicas) == (1, 0)


async def test_nothing_leaves_when_all_stand_still(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.add("t", max_tokens=8)
    await bench.placed(a, "s")
    await bench.placed(b, "t")
    await bench.steps(a, 1)
    await bench.steps(b, 1)
    a.stalled_s = b.stalled_s = 100.0
    await until(lambda: all(link.load.is_stalled for link in bench.client.links))
    await bench.add("u")  # and what comes is not refused
    await until(lambda: "u" in a.running or "u" in b.running)
    assert bench.client.counts.moved == 0
    a.stalled_s = b.stalled_s = 0.0
    await bench.finished("s", "t", "u")


async def test_what_a_replica_may_stand_still_over_is_tried_once_elsewhere(bench: Bench) -> None:
    a, b, c = [await bench.start(name) for name in "abc"]
    await bench.add("s")
    await bench.placed(a, "s")
    a.stalled_s = 100.0
    await bench.placed(b, "s~1")
    a.stalled_s, b.stalled_s = 0.0, 200.0
    await until(lambda: bench.link(b).load.is_stalled)
    await asyncio.sleep(10 * stalls.PERIOD_S)
    assert (set(b.running), c.running) == ({"s~1"}, {})
    await bench.kill(b)
    await until(lambda: len(a.running) + len(c.running) == 1)
    await bench.finished("s")


# ---- draining


async def test_a_draining_replicas_streams_move_and_are_aborted_there(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    await a.drain()
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    assert bench.link(a).load.own_tokens == 0
    await bench.add("t")
    await bench.placed(b, "s~1", "t")
    await bench.finished("s", "t")
    assert bench.client.counts.lost_replicas == 0


async def test_the_directory_may_know_of_a_drain_before_the_replica(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s", max_tokens=8)
    await bench.placed(a, "s")
    await bench.steps(a, 3)
    bench.client.set_members([dataclasses.replace(a.member, is_leaving=True), b.member])
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await a.drain(is_draining=False)  # an older answer of the replica changes nothing
    await bench.add("t")
    await bench.placed(b, "s~1", "t")
    await bench.finished("s", "t")


async def test_if_only_a_draining_replica_is_left_its_streams_stay_and_new_ones_wait(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 1)
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    await bench.add("new")
    assert bench.client.num_held == 1
    await bench.finished("s")
    assert a.aborted == []
    b = await bench.start("b")
    await bench.placed(b, "new")
    await bench.finished("new")


async def test_streams_leave_a_draining_replica_when_a_replacement_links(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 2)
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await until(lambda: a.aborted == ["s"])
    await bench.finished("s")


async def test_a_stream_that_cannot_move_stays_on_its_draining_replica(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("audio", is_resumable=True)
    await bench.add("s")
    await bench.placed(a, "audio")
    await bench.placed(b, "s")
    await a.drain()
    await until(lambda: bench.link(a).pong.is_draining)
    await bench.finished("s", "audio")
    assert a.aborted == []


# ---- poison


async def test_a_stream_that_kills_two_replicas_is_given_up_and_its_neighbours_finish(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    for i in range(4):
        await bench.add(f"old{i}", max_tokens=9)
    await until(lambda: len(a.running) == len(b.running) == 2)
    await bench.steps(a, 2)
    await bench.steps(b, 2)
    await bench.add("poison", prompt=[1, POISON])
    await until(lambda: "poison" in a.running or "poison" in b.running)
    first, second = (a, b) if "poison" in a.running else (b, a)
    await first.step()
    await bench.lost(first)
    await until(lambda: "poison~1" in second.running)
    link = bench.link(second)
    await until(lambda: link.pong_s > link.streams["poison~1"].placed_s, "the second one was alive with it")
    await second.step()
    await bench.lost(second)
    await bench.ended("poison")
    assert bench.failed("poison")
    c = await bench.start("c")
    c.run()
    await bench.finished(*(f"old{i}" for i in range(4)))
    assert bench.client.counts.given_up == 1
    assert bench.client.counts.lost_replicas == 2


@pytest.mark.parametrize("position", range(4))
async def test_suspects_are_tried_one_by_one_and_only_poison_is_convicted(bench: Bench, position: int) -> None:
    """Four streams wait on a replica when it dies at its first step; any of them may be the poison."""
    names = [f"s{i}" for i in range(4)]
    a = await bench.start("a")
    for i, name in enumerate(names):
        await bench.add(name, prompt=[1, POISON] if i == position else [1, i + 2])
    await bench.placed(a, *names)
    await a.step()
    await bench.lost(a)
    await until(lambda: bench.client.num_held == 4)

    b, c = await bench.start("b"), await bench.start("c")
    await until(lambda: len(b.running) == len(c.running) == 1)
    assert bench.client.num_held == 2
    spares = iter("defg")
    while not all(name in bench.endings for name in names):
        for replica in [r for r in bench.replicas.values() if r.is_alive]:
            link = bench.link(replica)
            suspects = [stream for stream in link.streams.values() if stream.is_suspect]
            assert len(suspects) <= 1
            for stream in suspects:  # a death that follows too fast for a sign of life is judged as less
                await until(lambda s=stream, k=link: k.pong_s > s.placed_s or not s.is_suspect)  # type: ignore[misc]
            await replica.step()
            if not replica.is_alive:
                await bench.lost(replica)
                await bench.start(next(spares))
        await asyncio.sleep(0)
    for i, name in enumerate(names):
        if i == position:
            assert bench.failed(name)
        else:
            assert (bench.tokens[name], bench.endings[name]) == (bench.expected[name], ["length"])
    assert bench.client.counts.lost_replicas == 2


async def test_a_token_acquits_of_earlier_deaths_only(bench: Bench) -> None:
    """Both gave a token on the first replica and none on the second: suspects, which a third tries one by one."""
    a = await bench.start("a")
    await bench.add("s")
    await bench.add("t")
    await bench.placed(a, "s", "t")
    await bench.steps(a, 1)
    await bench.kill(a)
    b = await bench.start("b")
    await bench.placed(b, "s~1", "t~1")
    await bench.kill(b)
    c = await bench.start("c")
    await bench.placed(c, "s~2")
    await bench.steps(c, 1)
    await bench.placed(c, "s~2", "t~2")
    await bench.finished("s", "t")


async def silence(bench: Bench, replica: ToyReplica) -> None:
    """The link to a replica that lives, and was heard of since its last stream came, breaks; then it is back."""
    link = bench.link(replica)
    await until(lambda: any(link.pong_s > s.placed_s for s in link.streams.values()))
    await replica.break_output_connection()
    await until(lambda: any(k.replica_id == replica.replica_id and k is not link for k in bench.client.links))


async def test_replicas_that_come_back_convict_nobody(bench: Bench) -> None:
    """As when the whole machine stands still for seconds, twice: nobody died, so no request is a killer."""
    a = await bench.start("a")
    await bench.add("s")
    await bench.add("t")
    await bench.placed(a, "s", "t")
    for _ in range(3):
        await silence(bench, a)
    await bench.finished("s", "t")
    assert bench.client.counts.given_up == 0


async def test_a_verdict_waits_for_the_return_of_a_replica(bench: Bench) -> None:
    """One replica falls silent, the next dies; the first one's return clears the stream of both."""
    a = await bench.start("a")
    await bench.add("s")
    link = bench.link(a)
    await until(lambda: any(link.pong_s > s.placed_s for s in link.streams.values()))
    bench.client.set_members([])
    await a.break_output_connection()
    await until(lambda: not bench.client.links)
    b = bench.replicas["b"] = ToyReplica("b")
    bench.client.set_members([b.member])
    await bench.placed(b, "s~1")
    link = bench.link(b)
    await until(lambda: any(link.pong_s > s.placed_s for s in link.streams.values()))
    b.kill()
    await until(lambda: not bench.client.links and bench.client.num_held == 1)
    bench.follow()
    await bench.placed(a, "s~2")
    await bench.finished("s")
    assert bench.client.counts.given_up == 0


async def test_a_stream_can_be_aborted_while_its_verdict_waits(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "RETURN_WAIT_S", 3600.0)
    await bench.add("s")
    for name in "ab":
        replica = await bench.start(name)
        link = bench.link(replica)
        await until(lambda k=link: any(k.pong_s > s.placed_s for s in k.streams.values()))  # type: ignore[misc]
        await bench.kill(replica)
    await until(lambda: bench.client.num_held == 1)
    await bench.client.abort(["s"])
    assert bench.client.num_held == 0


async def test_a_stream_that_silences_its_replica_again_and_again_is_given_up(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.placed(a, "s")
    for _ in range(quarantine.MAX_UNSEEN_LOSSES):
        await silence(bench, a)
    link = bench.link(a)
    await until(lambda: bench.failed("s") or link.streams)
    if not bench.failed("s"):
        await a.break_output_connection()
    await bench.ended("s")
    assert bench.failed("s")


async def test_a_suspect_does_not_keep_others_away(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("suspect", max_tokens=50)
    await bench.placed(a, "suspect")
    await bench.kill(a)
    await bench.placed(b, "suspect~1")
    await bench.add("s")
    await bench.placed(b, "suspect~1", "s")
    await bench.finished("s", "suspect")


async def test_an_aborted_suspect_makes_room_for_the_next(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s")
    await bench.add("t")
    await bench.placed(a, "s", "t")
    await bench.kill(a)
    b = await bench.start("b")
    await bench.placed(b, "s~1")
    await bench.client.abort(["s"])
    await bench.placed(b, "t~1")
    await bench.finished("t")


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        pytest.param(
            {"engine_version": "toy-2"}, ["gateway runs vLLM toy-1, replica vLLM toy-2", "install"], id="version"
        ),
        pytest.param({"secret": "another"}, ["another fleet"], id="secret"),
    ],
)
async def test_a_refused_gateway_knows_why_and_uses_the_others(
    bench: Bench, settings: dict[str, str], words: list[str]
) -> None:
    await bench.start("a", is_awaited=False, **settings)
    await until(lambda: "a" in bench.client.refusals)
    assert all(word in bench.client.refusals["a"] for word in words)
    assert bench.client.links == []
    b = await bench.start("b")
    await bench.add("s")
    await bench.placed(b, "s")
    await bench.finished("s")


async def test_a_refusal_is_forgotten_when_the_replica_accepts(bench: Bench) -> None:
    a = await bench.start("a", is_awaited=False, secret="another")
    await until(lambda: "a" in bench.client.refusals)
    a.secret = SECRET
    await until(lambda: bench.client.links)
    assert bench.client.refusals == {}


async def test_an_address_where_nobody_answers_harms_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "HANDSHAKE_TIMEOUT_S", 0.05)
    gone = ToyReplica("gone")
    gone.kill()
    bench.client.set_members([gone.member])
    await bench.add("s")
    a = await bench.start("a")
    await bench.placed(a, "s")
    await bench.finished("s")


# ---- aborts


async def test_an_abort_frees_the_replica(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.add("s", prompt=[1] * 64, max_tokens=500)
    await bench.add("t")
    await bench.placed(a, "s", "t")
    await bench.steps(a, 2)
    await bench.client.abort(["s", "never seen"])
    assert bench.link(a).load.own_tokens == 4  # t's: 6 tokens, 2 given
    await until(lambda: a.aborted == ["s"])
    await bench.finished("t")
    assert "s" not in bench.endings
    assert bench.client.links[0].load.own_tokens == 0


async def test_a_moved_stream_is_aborted_by_the_id_its_replica_knows(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    await bench.add("s")
    await bench.placed(a, "s")
    await bench.steps(a, 1)
    await bench.kill(a)
    await bench.placed(b, "s~1")
    await bench.client.abort(["s"])
    await until(lambda: b.aborted == ["s~1"])
    assert b.running == {}


# ---- utility calls


async def test_a_call_gathers_the_answers_of_all_replicas(bench: Bench) -> None:
    a, b = await bench.start("a"), await bench.start("b")
    assert sorted(await bench.client.call("add_lora", (7, "x"))) == ["a did add_lora", "b did add_lora"]
    assert a.calls == b.calls == [("add_lora", (7, "x"))]


async def test_a_call_waits_for_the_first_replica(bench: Bench) -> None:
    call = asyncio.create_task(bench.client.call("get_supported_tasks", ()))
    await bench.start("a")
    assert await call == ["a did get_supported_tasks"]


async def test_a_call_after_the_fleet_was_lost_waits_for_the_next_replica(bench: Bench) -> None:
    await bench.kill(await bench.start("a"))
    call = asyncio.create_task(bench.client.call("is_sleeping", ()))
    await bench.start("b")
    assert await call == ["b did is_sleeping"]


async def test_a_failed_call_names_the_replica(bench: Bench) -> None:
    await bench.start("a")
    b = await bench.start("b")
    b.call_failure = "no such adapter"
    with pytest.raises(EngineError, match="replica b: no such adapter"):
        await bench.client.call("add_lora", (7,))
    await until(lambda: not any(link.calls for link in bench.client.links), "the other replica has answered")


async def test_a_replica_that_dies_meanwhile_needs_not_answer_a_call(bench: Bench) -> None:
    a = await bench.start("a")
    await bench.start("b")
    a.is_silent_to_calls = True
    call = asyncio.create_task(bench.client.call("sleep", ()))
    await until(lambda: a.calls)
    await bench.kill(a)
    assert await call == ["b did sleep"]


async def test_a_call_whose_replicas_all_die_is_made_to_the_next(bench: Bench) -> None:
    """As when a gateway starts while the only replica is replaced."""
    a = await bench.start("a")
    a.is_silent_to_calls = True
    call = asyncio.create_task(bench.client.call("get_supported_tasks", ()))
    await until(lambda: a.calls)
    await bench.kill(a)
    await bench.start("b")
    assert await call == ["b did get_supported_tasks"]


# ---- any order of events


@pytest.mark.parametrize("seed", range(25))
async def test_every_stream_ends_once_and_whole_whatever_happens(seed: int) -> None:
    """Adds, kills, starts, drains and aborts in random order over replicas that step by themselves.

    A stream whose replica is killed twice before it gave a token is taken for poison, so a kill waits until the last
    one was noticed and no stream is a suspect; everything else may happen at any moment.
    """
    rng = random.Random(seed)
    async with make_bench() as bench:
        names = (f"r{i}" for i in range(1000))
        aborted: set[str] = set()
        num_added = 0

        async def start() -> None:
            replica = await bench.start(next(names), is_awaited=rng.random() < 0.5)
            replica.run()

        def alive() -> list[ToyReplica]:
            return [replica for replica in bench.replicas.values() if replica.is_alive]

        def may_kill() -> bool:
            noticed = all(bench.replicas[link.replica_id].is_alive for link in bench.client.links)
            return noticed and not any(stream.is_suspect for stream in bench.client._streams.values())

        for _ in range(60):
            event = rng.choices(["add", "kill", "start", "drain", "abort", "breathe"], [10, 2, 3, 2, 1, 6])[0]
            if event == "add":
                for _ in range(rng.randint(1, 4)):
                    prompt = [rng.randrange(600) for _ in range(rng.randint(1, 20))]
                    await bench.add(f"s{num_added}", prompt, max_tokens=rng.randint(1, 40))
                    num_added += 1
            elif event == "kill" and alive():
                victim = rng.choice(alive())
                if all(replica.is_draining for replica in alive() if replica is not victim):
                    await start()  # suspects wait for one that takes work
                await until(may_kill)
                victim.kill()
                bench.follow()
            elif event == "start" and len(alive()) < 4:
                await start()
            elif event == "drain" and alive():
                replica = rng.choice(alive())
                await replica.drain(not replica.is_draining)
            elif event == "abort" and num_added:
                name = f"s{rng.randrange(num_added)}"
                await bench.client.abort([name])
                if name not in bench.endings:
                    aborted.add(name)
            for _ in range(rng.randint(0, 20)):
                await asyncio.sleep(0)

        for replica in alive():
            await replica.drain(False)
        await start()
        whole = {f"s{i}" for i in range(num_added)} - aborted
        await bench.ended(*whole)
        for name in whole:
            assert (name, bench.endings[name]) == (name, ["length"])
            assert (name, bench.tokens[name]) == (name, bench.expected[name])
        for name in aborted:  # an abort may meet its stream's last tokens on their way; what came is right
            tokens = bench.tokens.get(name, [])
            assert tokens == bench.expected[name][: len(tokens)]
        assert bench.client.counts.given_up == bench.client.counts.expired == 0
