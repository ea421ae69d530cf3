"""TLS between gateways, which know each other by a digest."""

import asyncio
import ssl

import aiohttp
import pytest

from kervan.fleet import pinned_tls
from kervan.gateway import page
from kervan.gateway.asgi import CollectedResponse
from kervan.gateway.relay import Relay, RelayFailedError


async def never() -> None:
    await asyncio.Event().wait()


class Peer:
    """An internal port that answers every request with a page; `heard`: what came, decrypted."""

    def __init__(self, own: pinned_tls.OwnCertificate) -> None:
        self.own = own
        self.heard = bytearray()
        self._server: asyncio.Server

    async def __aenter__(self) -> "Peer":
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(4096):
                self.heard += data
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\npage")

        self._server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=self.own.context)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def address(self, digest: str) -> str:
        return f"https://127.0.0.1:{self._server.sockets[0].getsockname()[1]}#{digest}"


def get(address: str) -> bytes:
    return pinned_tls.get(address, "/x", headers={}, timeout_s=5.0)


async def relayed(address: str) -> bytes:
    response = CollectedResponse()
    scope = {
        "type": "http", "method": "GET", "path": "/x", "raw_path": b"/x", "query_string": b"", "headers": [],
    }  # fmt: skip
    relay = Relay()
    try:
        await relay.forward([address], b"the key", scope, b"", never, response.send)  # type: ignore[arg-type]
    finally:
        relay.close()
    return response.body


async def test_a_gateway_is_asked_by_its_digest() -> None:
    async with Peer(pinned_tls.draw()) as peer:
        assert await relayed(peer.address(peer.own.digest)) == b"page"
        assert await page.fetch([peer.address(peer.own.digest)]) == ["page"]
        assert await asyncio.to_thread(get, peer.address(peer.own.digest)) == b"page"


async def test_without_a_loop_too_nothing_is_sent_to_another_gateway() -> None:
    async with Peer(pinned_tls.draw()) as peer:
        with pytest.raises(ConnectionError, match="another certificate"):
            await asyncio.to_thread(get, peer.address("0" * 64))
        assert not peer.heard


async def test_one_with_another_certificate_gets_not_even_the_request() -> None:
    async with Peer(pinned_tls.draw()) as impostor:
        address = impostor.address(pinned_tls.draw().digest)
        with pytest.raises(RelayFailedError, match="another certificate"):
            await relayed(address)
        assert await page.fetch([address]) == [None]
        url, pin = page.pinned(address)
        async with aiohttp.ClientSession() as session:
            with pytest.raises(aiohttp.ServerFingerprintMismatch):
                await session.post(url, ssl=pin, data=b"x")
        assert impostor.heard == b""


async def test_one_that_promised_a_certificate_and_speaks_plain_text_gets_nothing() -> None:
    heard = bytearray()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read(4096))
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    with pytest.raises(RelayFailedError):
        await relayed(f"https://127.0.0.1:{port}#{pinned_tls.draw().digest}")
    assert b"the key" not in heard
    server.close()


def test_each_gateway_draws_its_own_and_speaks_the_newest_tls() -> None:
    one, other = pinned_tls.draw(), pinned_tls.draw()
    assert one.digest != other.digest
    assert one.context.minimum_version == ssl.TLSVersion.TLSv1_3


def test_an_address_has_a_digest_or_none() -> None:
    assert pinned_tls.split("https://h:1#ab") == ("https://h:1", "ab")
    assert pinned_tls.split("[::1]:2") == ("[::1]:2", "")
