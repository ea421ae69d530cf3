"""A gateway and a replica without Ray, whose streams move when their request id says so.

`move5` in a request's id moves its streams after 5 tokens, `move-always` after each; on one replica, under a new wire
id, which is the same to gateway and engine as a move to another one. Its clients can come back to their streams.
"""

import asyncio
import multiprocessing
import os
import re
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from harness.warm_place import WarmPlace

START_S = 400.0


class MovingFleet:
    """The gateway's process; it has started the replica's."""

    def __init__(self, model: Path, arguments: dict[str, Any], scratch: Path, warm: WarmPlace):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(model), arguments, str(scratch), warm))
        self._process.start()
        theirs.close()
        assert self._connection.poll(START_S), "the fleet did not start"
        self.url = f"http://127.0.0.1:{self._connection.recv()}"

    def num_moves(self) -> int:
        """Since the last time."""
        self._connection.send("moves")
        moves: int = self._connection.recv()
        return moves

    def close(self) -> None:
        self._connection.close()
        self._process.join(30)
        if self._process.is_alive():
            self._process.kill()
        self._process.join()


def _serve(connection: Connection, model: str, arguments: dict[str, Any], scratch: str, warm: WarmPlace) -> None:
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    tempfile.tempdir = warm.directory
    asyncio.run(_run(connection, model, arguments, Path(scratch), warm))


async def _run(connection: Connection, model: str, arguments: dict[str, Any], scratch: Path, warm: WarmPlace) -> None:
    import uvicorn

    from kervan.config.fleet import FleetConfig
    from kervan.fleet.auth import Secrets
    from kervan.fleet.client import FleetClient
    from kervan.fleet.control import EngineSpec
    from kervan.fleet.link import Member, ReplicaLink
    from kervan.fleet.process import EngineProcess
    from kervan.fleet.reconnect.replicated_store import ReplicatedStore
    from kervan.fleet.vllm.frontend import OpenAIFrontend, VllmCodec
    from kervan.gateway.asgi import Receive, Scope, Send, replay
    from kervan.gateway.reconnect import STREAMS_PREFIX, Streams

    class MovingClient(FleetClient):
        def _deliver(self, link: ReplicaLink, outputs: Any) -> None:
            super()._deliver(link, outputs)
            for stream in list(link.streams.values()):
                wanted = re.search(r"move(-always|\d+)", stream.request_id)
                if wanted is None or not stream.gave_token:
                    continue
                if wanted[1] == "-always" or (len(stream.generated) == int(wanted[1]) and stream.epoch == 0):
                    old_wire_id = stream.wire_id
                    self._placements.unplace(stream, link)  # at once: no token may come between
                    moving.add(task := asyncio.create_task(self._force(stream, link, old_wire_id)))
                    task.add_done_callback(moving.discard)

        async def _force(self, stream: Any, link: ReplicaLink, old_wire_id: str) -> None:
            await link.input.send_multipart(self.codec.encode_abort([old_wire_id]), copy=False)
            if self._placements.streams.get(stream.request_id) is stream:
                await self._placements.move(stream, link, target=link.replica_id)

    moving: set[asyncio.Task[None]] = set()
    argv = FleetConfig(model=model, engine_args=arguments).engine_argv
    replica = EngineProcess(
        EngineSpec("a", list(argv), "127.0.0.1", "s3cret"),
        log_path=scratch / "moving.log",
        env=warm.environment,
        fork_for_pid=os.getppid(),  # for the tests' own process
    )
    try:
        client = MovingClient(VllmCodec(), secret="s3cret")
        starting = asyncio.create_task(OpenAIFrontend.start(client, argv, is_followed=True))
        streams = Streams("gw", list, b"")
        streams.store = ReplicatedStore(
            gateway_id="gw", node="n", secrets=Secrets("s3cret"), engine_version="", replay_s=60, max_bytes=1 << 26
        )
        client.copy_sender = streams.store.copy_sender
        while replica.ready is None:
            assert replica.failure is None, replica.failure
            await asyncio.sleep(0.1)
        client.set_members([Member("a", replica.ready.address, replica.ready.public_key)])
        frontend = await starting

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["path"].startswith(STREAMS_PREFIX):
                await streams.get(frontend.app, scope, receive, send)
                return
            message = await receive()  # uvicorn gives these small bodies in one piece
            await streams.post(frontend.app, scope, replay(message["body"], receive), send, message["body"])

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off", interface="asgi3"))
        serving = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.05)
        connection.send(server.servers[0].sockets[0].getsockname()[1])
        await _answer(connection, client)
        server.should_exit = True
        await serving
        await frontend.close()
        await streams.store.close()
        await client.close()
    finally:
        replica.kill()


async def _answer(connection: Connection, client: Any) -> None:
    told = 0
    while True:
        try:
            await asyncio.to_thread(connection.recv)
        except EOFError:
            return
        connection.send(client.counts.moved - told)
        told = client.counts.moved


def deltas(chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What all chunks of a streamed answer say together; where one chunk ends and the next begins does not count."""
    told: dict[str, Any] = {}
    for chunk in chunks:
        if chunk.get("usage"):
            told["usage"] = {name: chunk["usage"][name] for name in ("prompt_tokens", "completion_tokens")}
        for choice in chunk["choices"]:
            whole = told.setdefault(choice["index"], {"text": "", "reasoning": "", "calls": {}, "logprobs": []})
            delta = choice.get("delta") or {}
            whole["text"] += choice.get("text") or delta.get("content") or ""
            whole["reasoning"] += delta.get("reasoning") or delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls") or ():
                known = whole["calls"].setdefault(call["index"], ["", ""])
                known[0] += call["function"].get("name") or ""
                known[1] += call["function"].get("arguments") or ""
            whole["logprobs"] += _logprobs(choice.get("logprobs") or {})
            if choice.get("finish_reason"):
                whole["finish"] = choice["finish_reason"], choice.get("stop_reason")
    return told


def _logprobs(told: dict[str, Any]) -> list[tuple[str, float]]:
    if "content" in told:
        return [(row["token"], round(row["logprob"], 3)) for row in told["content"] or ()]
    values = [round(value, 3) if value is not None else 0.0 for value in told.get("token_logprobs") or ()]
    return list(zip(told.get("tokens") or (), values, strict=True))
