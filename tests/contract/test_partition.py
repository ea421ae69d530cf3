"""Two gateways and two twins; the network breaks between one gateway and one twin, and nowhere else."""

import asyncio
import re
from pathlib import Path

import zmq.asyncio
from harness.live import until
from harness.twin_bench import LIMITS, SECRET, TwinBench

from kervan.fleet import wire
from kervan.fleet.link import Member, ReplicaLink, open_link
from kervan.fleet.vllm.codec import VllmCodec
from kervan.twin.token_engine import StepTiming, answer

TIMING = StepTiming(base_s=0.01, prefill_token_s=1e-6, sequence_s=0.0, context_token_s=0.0)
OUTPUT_ADDRESS = re.compile(rb"tcp://127\.0\.0\.1:(\d{5})")


class Wire:
    """A proxy between gateways and one port of a replica. Cut, it carries nothing and closes nothing.

    `outputs`: the proxy that takes the place of the output address, which the replica tells in its WELCOME.
    """

    def __init__(self, outputs: "Wire | None" = None) -> None:
        self.port = 0
        self.target_port = 0
        self._outputs = outputs
        self._whole = asyncio.Event()
        self._whole.set()
        self._cut = asyncio.Event()
        self._server: asyncio.Server
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        self._whole.clear()
        self._cut.set()

    def heal(self) -> None:
        """Connections from before the cut are reset: what they had lost does not come late."""
        self._cut.clear()
        self._whole.set()

    async def close(self) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        ends = [writer]
        try:
            await self._whole.wait()  # as if the first packet were sent until it comes through
            there, back = await asyncio.open_connection("127.0.0.1", self.target_port)
            ends.append(back)
            jobs = [
                asyncio.create_task(job)
                for job in (self._pump(reader, back), self._pump(there, writer), self._cut.wait())
            ]
            await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
            for job in jobs:
                job.cancel()
            await self._whole.wait()
        finally:
            for end in ends:
                end.transport.abort()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            sink.write(OUTPUT_ADDRESS.sub(self._redirect, data) if self._outputs is not None else data)

    def _redirect(self, told: re.Match[bytes]) -> bytes:
        assert self._outputs is not None
        self._outputs.target_port = int(told[1])
        return b"tcp://127.0.0.1:%d" % self._outputs.port


def link(bench: TwinBench, name: str) -> ReplicaLink:
    return next(link for link in bench.client.links if link.replica_id == name)


def prompts(kind: str, count: int) -> dict[str, list[int]]:
    return {f"{kind}{i}": [len(kind), i, *range(i + 3)] for i in range(count)}


async def run(bench: TwinBench, asked: dict[str, list[int]], num_tokens: int) -> None:
    for name, prompt in asked.items():
        await bench.add(name, prompt, num_tokens)
    await until(lambda: all(len(bench.tokens(name)) > 5 for name in asked))


def assert_exact(bench: TwinBench, asked: dict[str, list[int]], num_tokens: int) -> None:
    assert {name: bench.tokens(name) for name in asked} == {
        name: answer(prompt, num_tokens, LIMITS) for name, prompt in asked.items()
    }


async def test_a_gateway_whose_session_was_ended_links_again(tmp_path: Path) -> None:
    bench, context = TwinBench(tmp_path), zmq.asyncio.Context()
    try:
        await bench.start("a", TIMING)
        asked = prompts("s", 4)
        await run(bench, asked, 300)
        before, codec = link(bench, "a"), VllmCodec()
        hello = wire.Hello(wire.PROTOCOL, codec.engine_version, bench.client.gateway_id, layouts=codec.layouts)
        # Its name comes again, which ends its session as the end of a lease does; its connections live.
        (await open_link(context, before.member, hello, SECRET)).close()
        await bench.ended(*asked)
        assert link(bench, "a") is not before
        assert_exact(bench, asked, 300)
    finally:
        await bench.close()
        context.destroy(linger=0)


async def test_a_partition_between_one_gateway_and_one_replica(tmp_path: Path) -> None:
    outputs = Wire()
    inputs = Wire(outputs)
    near, far = (
        TwinBench(tmp_path, encrypts=False) for _ in range(2)
    )  # two gateways; the wire is between `far` and "a"
    try:
        for name in "ab":
            await near.start(name, TIMING)
        a, b = near.twins["a"], near.twins["b"]
        assert a.ready is not None
        assert b.ready is not None
        await outputs.start()
        await inputs.start()
        inputs.target_port = int(a.ready.address.rpartition(":")[2])
        far.client.set_members([Member("a", f"tcp://127.0.0.1:{inputs.port}"), Member("b", b.ready.address)])
        await until(lambda: len(far.client.links) == 2)

        long, short = prompts("long", 12), prompts("s", 12)
        await run(near, long, 1600)
        await run(far, short, 700)
        near_a, num_cut_off = len(link(near, "a").streams), len(link(far, "a").streams)
        assert near_a > 0
        assert num_cut_off > 0
        await until(lambda: a.load.running == near_a + num_cut_off)

        inputs.cut()
        outputs.cut()
        await until(lambda: [link.replica_id for link in far.client.links] == ["b"], "the cut is noticed")
        await until(lambda: far.client.counts.moved == num_cut_off, "streams have moved")
        await until(lambda: a.load.running == near_a, "what the cut-off gateway left is aborted")
        assert len(link(near, "a").streams) == near_a
        await far.ended(*short)
        assert_exact(far, short, 700)

        inputs.heal()
        outputs.heal()
        await until(lambda: len(far.client.links) == 2, "the gateway is back")
        more = prompts("more", 12)
        await run(far, more, 300)
        assert link(far, "a").streams
        await far.ended(*more)
        assert_exact(far, more, 300)

        await until(lambda: all(near.is_over(name) for name in long), "the other gateway's streams end")
        assert_exact(near, long, 1600)
        assert (near.client.counts.moved, near.client.counts.lost_replicas) == (0, 0)
        assert far.client.counts.given_up == 0
        await until(lambda: not a.load.has_work and not b.load.has_work)
    finally:
        await far.close()
        await near.close()
        await inputs.close()
        await outputs.close()
