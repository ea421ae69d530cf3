"""A fleet client on a bench: toy replicas in this process, real sockets, real frames, no engine.

A toy replica's next token is a function of all tokens before it (`next_token`), so a token that is lost, doubled or
computed from a wrong prefix changes every later one. Replicas step when the test says so, or by themselves (`run`).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
import zmq
import zmq.asyncio

from harness.live import until
from kervan.fleet import links, stalls, wire
from kervan.fleet.client import FleetClient
from kervan.fleet.link import Member, ReplicaLink
from kervan.fleet.stream import Stream
from kervan.policy import quarantine
from kervan.policy.prefix import PromptContent

SECRET = "s3cret"
VERSION = "toy-1"
FATAL = 666  # a prompt that holds it kills its replica at the first step

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
    cached_tokens: int | None = None


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

    def prompt(self, stream: Stream) -> PromptContent | None:
        return PromptContent(stream.request.prompt)

    def cached_tokens(self, output: Output) -> int | None:
        return output.cached_tokens

    def queue_s(self, output: Output) -> float | None:
        return None

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

    def finish(self, output: Output, stream: Stream) -> None:
        pass

    def failure(self, request_id: str) -> Outputs:
        return Outputs([Output(request_id, [], "error")])

    def record(self, output: Output) -> bytes:
        return msgspec.msgpack.encode(msgspec.structs.replace(output, request_id=""))

    def recorded(self, data: bytes, request_id: str) -> Outputs:
        return Outputs([msgspec.structs.replace(msgspec.msgpack.decode(data, type=Output), request_id=request_id)])


class ToyReplica:
    """Binds the two sockets and speaks the wire; one token per stream and step."""

    def __init__(
        self,
        replica_id: str,
        *,
        secret: str = SECRET,
        engine_version: str = VERSION,
        clock_ahead_s: float = 0,
        block_size: int = 16,
    ):
        self.replica_id = replica_id
        self.secret = secret
        self.engine_version = engine_version
        self.clock_ahead_s = clock_ahead_s
        self.block_size = block_size
        self.cached_tokens: int | None = None  # told with each output
        self.num_gateways = 1
        self.prefixes_heard = bytearray()
        self.prefixes_to_tell = b""
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
        self.received = bytearray()  # over both sockets
        self.num_outputs = 0
        self.num_to_lose = 0
        self.stalled_s = 0.0
        self.step_tokens = 0
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
            self.received += b"".join([identity, kind, *payload])
            if kind == wire.HELLO:
                await self._input.send_multipart([identity, *self._greet(identity, payload[0])])
            elif identity not in self._sessions:
                await self._input.send_multipart([identity, wire.REFUSED, b"the replica has no such session"])
            elif kind == wire.PING:
                self.last_ping = msgspec.msgpack.decode(payload[0], type=wire.Ping)
                self.prefixes_heard += self.last_ping.prefixes
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
        refusal = wire.refusal(
            hello,
            session=identity,
            replica_id=self.replica_id,
            engine_version=self.engine_version,
            secrets=(self.secret,),
        )
        if refusal is not None:
            return wire.REFUSED, refusal.encode()
        self._sessions = {identity}  # one client, so one count of outputs; a new session starts it again
        self._subscribed.clear()
        self.running.clear()
        self.num_outputs = 0
        facts = wire.EngineFacts(max_model_len=4096, num_gpu_blocks=100, block_size=self.block_size, max_num_seqs=8)
        welcome = wire.Welcome(
            self.replica_id, self.engine_version, self._output_address, time.monotonic() + self.clock_ahead_s, facts
        )
        return wire.WELCOME, msgspec.msgpack.encode(welcome)

    async def _serve_output(self) -> None:
        while True:
            identity, kind = await self._output.recv_multipart()
            self.received += identity + kind
            self._subscribed.add(identity)
            await self._output.send_multipart([identity, wire.SUBSCRIBED])

    def _pong(self) -> bytes:
        load = wire.Pong(
            len(self.running),
            0,
            0.0,
            self.other_tokens,
            self.is_draining,
            self.num_outputs,
            stalled_s=self.stalled_s,
            step_tokens=self.step_tokens,
            num_gateways=self.num_gateways,
            prefixes=self.prefixes_to_tell,
        )
        self.prefixes_to_tell = b""
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

    def end_sessions(self) -> None:
        """As when a lease ends: the connections stay, and what is asked over them is not heard."""
        self._sessions.clear()
        self._subscribed.clear()
        self.running.clear()

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
        """One token for each running stream per step, in one message; a fatal prompt kills the replica instead."""
        for _ in range(num_steps):
            if any(FATAL in request.prompt for request in self.running.values()):
                self.kill()
                return
            outputs = []
            for wire_id, request in list(self.running.items()):
                token = next_token(request.prompt)
                request.prompt.append(token)
                request.max_tokens -= 1
                is_last = request.max_tokens <= 0
                outputs.append(
                    Output(wire_id, [token], "length" if is_last else None, cached_tokens=self.cached_tokens)
                )
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

    def link(self, replica: ToyReplica) -> ReplicaLink:
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
    bench = Bench(FleetClient(codec, secret=settings.pop("secret", SECRET), encrypts=False, **settings))
    try:
        yield bench
        bench.check_integrity()
    finally:
        await bench.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds in a fleet takes some milliseconds on the bench."""
    monkeypatch.setattr(links, "RECONNECT_PERIOD_S", 0.01)
    monkeypatch.setattr(wire, "PING_PERIOD_S", 0.02)
    monkeypatch.setattr(stalls, "PERIOD_S", 0.02)
    monkeypatch.setattr(quarantine, "RETURN_WAIT_S", 0.2)


@pytest.fixture
async def bench(quick: None) -> AsyncIterator[Bench]:
    async with make_bench() as bench:
        yield bench
