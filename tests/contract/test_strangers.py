"""A replica whose port strangers reach: they learn nothing, change nothing, and the log says that they came."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import psutil
import pytest
import zmq
import zmq.asyncio
from harness.live import until
from harness.twin_bench import LIMITS, SECRET, TwinBench, member

from kervan.fleet import curve, wire
from kervan.fleet.curve import KeyPair
from kervan.fleet.link import Member
from kervan.fleet.process import TWIN_ENGINE, EngineProcess
from kervan.twin.replica import TwinSpec
from kervan.twin.token_engine import StepTiming, TwinSettings, answer

SLOW = StepTiming(base_s=0.01, prefill_token_s=1e-6, sequence_s=0.0, context_token_s=0.0)
PROMPT = [*b"what nobody else may read"]
PROMPT_ON_THE_WIRE = msgspec.msgpack.encode(PROMPT)[1:]
# ZMTP 3.1's greeting (its RFC 37): signature, version, mechanism, as-server, filler.
GREETING = b"\xff" + 8 * b"\0" + b"\x7f\x03\x01%b" + 32 * b"\0"
LONG_FRAME, LONG_COMMAND = b"\x02", b"\x06"
GIB = 1 << 30


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[TwinBench]:
    bench = TwinBench(tmp_path)
    yield bench
    await bench.close()


class Tap:
    """Carries bytes between clients and one port, and keeps a copy. `sent`: what clients said, by connection."""

    def __init__(self) -> None:
        self.sent: list[bytearray] = []
        self.received: list[bytearray] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._server: asyncio.Server

    async def start(self, port: int) -> int:
        async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, back = await asyncio.open_connection("127.0.0.1", port)
            sent, received = bytearray(), bytearray()
            self.sent.append(sent)
            self.received.append(received)
            for job in (pump(reader, back, sent), pump(there, writer, received)):
                self._tasks.append(asyncio.create_task(job))

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, copy: bytearray) -> None:
            try:
                while data := await source.read(65536):
                    copy.extend(data)
                    sink.write(data)
            finally:
                sink.transport.abort()

        self._server = await asyncio.start_server(carry, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


@pytest.mark.parametrize("encrypts", [True, False])
async def test_one_who_listens_reads_neither_prompts_nor_the_secret(tmp_path: Path, encrypts: bool) -> None:
    """Without encryption the same look finds the prompt, so it can fail."""
    owner, gateway, tap = TwinBench(tmp_path, encrypts=encrypts), TwinBench(tmp_path, encrypts=encrypts), Tap()
    try:
        twin = await owner.start("a")
        assert twin.ready is not None
        tapped = await tap.start(port_of(twin.ready.address))
        gateway.client.set_members([Member("a", f"tcp://127.0.0.1:{tapped}", twin.ready.public_key)])
        await gateway.is_linked("a")
        await gateway.add("s", PROMPT)
        await gateway.ended("s")
        assert gateway.tokens("s") == answer(PROMPT, 20, LIMITS)
        heard = b"".join(map(bytes, [*tap.sent, *tap.received]))
        assert len(heard) > 500
        assert SECRET.encode() not in heard
        told = (PROMPT_ON_THE_WIRE, b"engine_version", gateway.client.gateway_id.encode())
        assert [words in heard for words in told] == 3 * [not encrypts]
    finally:
        await gateway.close()
        await owner.close()
        await tap.close()


async def say(address: str, *parts: bytes) -> bytes:
    """What the replica answers to bytes over a bare connection, until it closes it or a second has passed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port_of(address))
    heard = bytearray()
    try:
        async with asyncio.timeout(1.0):
            for part in parts:
                writer.write(part)
                await writer.drain()
                await asyncio.sleep(0.02)
            while data := await reader.read(65536):
                heard += data
    except (TimeoutError, ConnectionError):
        pass
    writer.transport.abort()
    return bytes(heard)


async def hears_nothing(address: str, pair: KeyPair | None, server: bytes) -> None:
    """A ZMQ socket with these keys gets no word, whatever it says."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    wire.configure(socket)
    if pair is not None:
        curve.connect_as(socket, pair, server)
    try:
        socket.connect(address)
        hello = wire.Hello(wire.PROTOCOL, "x", "stranger")
        await socket.send_multipart([wire.HELLO, msgspec.msgpack.encode(hello)])
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.7):
                await socket.recv_multipart()
    finally:
        context.destroy(linger=0)


async def test_strangers_change_nothing_for_running_streams(bench: TwinBench) -> None:
    twin = await bench.start("a", SLOW)
    assert twin.ready is not None
    address, public_key = twin.ready.address, twin.ready.public_key.encode()
    asked = {f"s{i}": [i, *PROMPT] for i in range(4)}
    for name, prompt in asked.items():
        await bench.add(name, prompt, 400)
    await until(lambda: all(bench.tokens(name) for name in asked))
    link, resident = bench.client.links[0], psutil.Process(twin.pid).memory_info().rss
    gigabyte = GIB.to_bytes(8, "big")
    await asyncio.gather(
        hears_nothing(address, None, b""),  # plain text
        hears_nothing(address, curve.draw(), public_key),  # it knows the replica, and has keys of its own
        hears_nothing(address, curve.of_gateways(SECRET), curve.draw().public),  # it takes another for the replica
        hears_nothing(address, curve.of_gateways("guess"), public_key),
        say(address, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"),
        say(address, bytes(range(256)) * 4096),
        say(address, GREETING % b"NULL".ljust(20, b"\0"), LONG_FRAME + gigabyte, bytes(1 << 20)),
        say(address, GREETING % b"CURVE".ljust(20, b"\0"), LONG_COMMAND + gigabyte, bytes(1 << 20)),
        *(say(address, GREETING % b"CURVE".ljust(20, b"\0")) for _ in range(20)),
    )
    assert psutil.Process(twin.pid).memory_info().rss - resident < 64 << 20
    await bench.ended(*asked)
    assert {name: bench.tokens(name) for name in asked} == {
        name: answer(prompt, 400, LIMITS) for name, prompt in asked.items()
    }
    assert bench.client.links == [link]  # the connection of before: nothing had to move
    lines = [line for line in twin.log_path.read_text().splitlines() if "this fleet's" in line or "other keys" in line]
    assert len(lines) == 1, lines  # one, whoever came first
    assert SECRET not in twin.log_path.read_text()


async def test_a_recorded_connection_is_of_no_use_again(bench: TwinBench) -> None:
    twin = await bench.start("a")
    assert twin.ready is not None
    tap = Tap()
    tapped = await tap.start(port_of(twin.ready.address))
    gateway = TwinBench(bench.directory)
    try:
        gateway.client.set_members([Member("a", f"tcp://127.0.0.1:{tapped}", twin.ready.public_key)])
        await gateway.is_linked("a")
        await gateway.add("s", PROMPT)
        await gateway.ended("s")
        words = bytes(tap.sent[0])
        await until(lambda: twin.load.num_steps == 20)  # a token each
        heard = await say(
            twin.ready.address, *(bytes(part) for part in (words[i : i + 64] for i in range(0, len(words), 64)))
        )
        assert len(heard) < 1024  # a greeting, and its half of a handshake that nobody can end
        await bench.add("after", [1, 2, 3])
        await bench.ended("after")
        await until(lambda: twin.load.num_steps > 20)
        await until(lambda: not twin.load.has_work)
        assert twin.load.num_steps == 40  # those of `after`, and none for what was recorded
    finally:
        await gateway.close()
        await tap.close()


async def test_streams_outlive_the_keys_of_their_replica(bench: TwinBench) -> None:
    """Each start of a replica draws others; who knows the ones before is a stranger to it."""
    await bench.start("a", SLOW)
    await bench.add("s", PROMPT, 200)
    await until(lambda: len(bench.tokens("s")) > 20)
    before = bench.twins["a"]
    after = await bench.start("b", SLOW)
    before.drain()
    await until(lambda: not before.load.has_work and len(bench.tokens("s")) < 200)
    before.kill()
    await bench.ended("s")
    assert bench.tokens("s") == answer(PROMPT, 200, LIMITS)
    assert before.ready is not None
    assert after.ready is not None
    old_key = before.ready.public_key.encode()
    assert old_key != after.ready.public_key.encode()
    await hears_nothing(after.ready.address, curve.of_gateways(SECRET), old_key)


async def test_a_replica_with_new_keys_takes_gateways_of_before(bench: TwinBench) -> None:
    """While keys change, gateways that are not replaced yet go on to link to what is."""
    spec = TwinSpec("a", "127.0.0.1", "newer", TwinSettings(SLOW, LIMITS), secret_before=SECRET)
    await bench.join("a", EngineProcess(spec, log_path=bench.directory / "a.log", module=TWIN_ENGINE))
    await bench.add("s", PROMPT)
    await bench.ended("s")
    assert bench.tokens("s") == answer(PROMPT, 20, LIMITS)


async def test_a_gateway_of_an_encrypted_fleet_links_to_no_plain_replica(bench: TwinBench) -> None:
    plain = TwinBench(bench.directory, encrypts=False)
    try:
        twin = await plain.start("p")
        bench.client.set_members([member("p", twin)])
        await until(lambda: bench.client.refusals)
        assert "encrypted" in bench.client.refusals["p"]
        assert bench.client.links == []
    finally:
        await plain.close()
