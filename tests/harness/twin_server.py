"""A server of this process that answers as twins do, and spoils what it is told to."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from kervan.config.fleet import FleetConfig
from kervan.twin.settings import settings
from kervan.twin.token_engine import answer

SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1024,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "max_position_embeddings": 2048, "eos_token_id": 1, "tie_word_embeddings": False,
}  # fmt: skip
TOKEN_S = 0.005


@dataclass
class TwinServer:
    """Answers as twins do, and spoils the answers whose numbers are in `faults`."""

    config: FleetConfig
    faults: dict[int, str] = field(default_factory=dict)
    count: int = 0
    port: int = 0

    def __post_init__(self) -> None:
        self._limits = settings(self.config).limits

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                if head.startswith(b"get"):
                    writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                    continue
                body = json.loads(await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0])))
                self.count += 1
                await self._answer(body, self.faults.get(self.count, ""), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, body: dict[str, Any], fault: str, writer: asyncio.StreamWriter) -> None:
        tokens = answer(body["prompt"], body["max_tokens"], self._limits)
        if fault == "busy":
            writer.write(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy")
            return
        if fault == "lose":
            del tokens[3]
        elif fault == "double":
            tokens[3:3] = tokens[1:3]
        elif fault == "change":
            tokens[3] += 1
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

        def event(value: Any) -> bytes:
            piece = b"data: " + (value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n\n"
            return b"%x\r\n%s\r\n" % (len(piece), piece)

        for number, token in enumerate(tokens, 1):
            if fault == "break" and number == 5:
                raise ConnectionError
            reason = "length" if number == len(tokens) else None
            writer.write(event({"choices": [{"text": "a", "token_ids": [token], "finish_reason": reason}]}))
            await asyncio.sleep(TOKEN_S)
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": len(tokens)}
        writer.write(event({"choices": [], "usage": usage}) + event(b"[DONE]") + b"0\r\n\r\n")
        await writer.drain()


@contextmanager
def serving(config: FleetConfig) -> Iterator[TwinServer]:
    """A server within the block."""
    made = TwinServer(config)
    ready, ended, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def main() -> None:
        listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
        made.port = listening.sockets[0].getsockname()[1]
        ready.set()
        await ended.wait()
        listening.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield made
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(10)
        loop.close()
