"""Journals of streams, and a gateway that takes copies of them."""

import time

from kervan.fleet import pinned_tls
from kervan.fleet.auth import Secrets
from kervan.fleet.reconnect.copy_holder import CopyHolder
from kervan.fleet.reconnect.journal import Journal
from kervan.fleet.reconnect.store import JournalStore
from kervan.gateway.server import listen
from kervan.policy.replication import Peer

SECRET, VERSION = "s3cret", "toy-1"


def new_journals() -> JournalStore:
    return JournalStore(replay_s=60, max_bytes=1 << 24, now=time.monotonic)


def journal(stream_id: str = "gw-a-1", body: bytes = b"{}") -> Journal:
    return Journal(stream_id, b"digest", "/v1/completions", [(b"x", b"y")], body)


class Holder:
    """A gateway that takes copies."""

    def __init__(self, name: str, *, secret: str = SECRET, version: str = VERSION):
        self.name = name
        self.journals = new_journals()
        self.copies = CopyHolder(self.journals, secrets=Secrets(secret), engine_version=version)
        self.peer: Peer

    async def start(self) -> None:
        sock = listen("127.0.0.1", 0)
        own = pinned_tls.draw()
        self.peer = Peer(self.name, "n2", f"127.0.0.1:{sock.getsockname()[1]}#{own.digest}")
        await self.copies.listen(sock, own.context)

    def has(self, stream_id: str) -> int:
        copy = self.journals.get(stream_id)
        return -1 if copy is None else copy.num_tokens
