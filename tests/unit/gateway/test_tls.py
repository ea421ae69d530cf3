"""TLS towards clients: files that cannot be used, a real client, and a new certificate under a running stream."""

import asyncio
import datetime
import os
import socket
import ssl
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from harness.certificates import DAY, Ca

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError
from kervan.gateway.connection import Connection
from kervan.gateway.leaving import send_clients_away
from kervan.gateway.tls import ServerTls, TlsFiles, context_of, files_of


@pytest.fixture
def ca(tmp_path: Path) -> Ca:
    return Ca(tmp_path)


def pair(ca: Ca, **how: Any) -> TlsFiles:
    return TlsFiles(*map(str, ca.issue(**how)))


def of_another_key(ca: Ca) -> TlsFiles:
    return TlsFiles(pair(ca).certificate, pair(ca, name="other").key)


def empty_key(ca: Ca) -> TlsFiles:
    files = pair(ca)
    Path(files.key).write_text("nothing\n")
    return files


def spoil(files: TlsFiles) -> None:
    Path(files.key).write_text("half a ")


def no_pem(ca: Ca) -> TlsFiles:
    files = pair(ca)
    Path(files.certificate).write_bytes(b"\x30\x82")
    return files


def no_file(ca: Ca) -> TlsFiles:
    return TlsFiles("/nowhere/fullchain.pem", pair(ca).key)


def upside_down(ca: Ca) -> TlsFiles:
    files = pair(Ca(ca.directory, "middle", ca))
    path = Path(files.certificate)
    own, middle = path.read_text().split("-----END CERTIFICATE-----\n")[:2]
    path.write_text("".join(f"{part}-----END CERTIFICATE-----\n" for part in (own, own, middle)))
    return files


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda ca: pair(ca, starts_in=-9 * DAY, ends_in=-2 * DAY), ["expired on", "renew"], id="expired"),
        pytest.param(lambda ca: pair(ca, starts_in=DAY, ends_in=2 * DAY), ["is valid from", "clock"], id="not yet"),
        pytest.param(of_another_key, ["other.key is not the key", "first"], id="another key"),
        pytest.param(empty_key, ["holds no private key", "BEGIN PRIVATE KEY"], id="no key"),
        pytest.param(lambda ca: pair(ca, password=b"pw"), ["is encrypted", "openssl pkey"], id="encrypted key"),
        pytest.param(no_pem, ["holds no certificate in PEM", "BEGIN CERTIFICATE"], id="DER"),
        pytest.param(no_file, ["/nowhere/fullchain.pem does not exist on", "each node"], id="missing"),
        pytest.param(lambda ca: pair(ca, hosts=()), ["names no host", "subjectAltName"], id="no names"),
        pytest.param(upside_down, ["out of order", "own first"], id="order"),
        pytest.param(
            lambda ca: pair(Ca(ca.directory, "middle", ca), has_chain=False, issuer_url="http://ca.example/middle.crt"),
            ["whose issuer CN=middle is no root here", "fullchain.pem"],
            id="no chain",
        ),
        pytest.param(
            lambda ca: TlsFiles(*map(str, ca.issue()), client_ca=str(ca.directory / "server.key")),
            ["tls_client_ca", "holds no certificate"],
            id="client CA",
        ),
    ],
)
def test_files_that_clients_would_refuse_are_told_in_one_line(
    ca: Ca, make: Callable[[Ca], TlsFiles], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as told:
        context_of(make(ca))
    assert "\n" not in str(told.value)
    assert all(word in str(told.value) for word in words), told.value


def test_an_unreadable_key_is_told(ca: Ca, tmp_path: Path) -> None:
    files = pair(ca)
    with pytest.raises(ConfigError, match="cannot be read on"):
        context_of(TlsFiles(files.certificate, str(Path(files.key) / "key.pem")))


def test_a_pipe_or_a_directory_is_refused_and_not_waited_for(ca: Ca, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(ConfigError, match="is a directory or no regular file; give the file itself"):
            context_of(TlsFiles(str(path), pair(ca).key))


def test_what_libraries_say_of_a_file_in_der_is_left_out(ca: Ca, tmp_path: Path) -> None:
    (tmp_path / "key.der").write_bytes(b"0w\x02\x01")
    with pytest.raises(ConfigError, match="that OpenSSL can use; give the file that begins"):
        context_of(TlsFiles(pair(ca).certificate, str(tmp_path / "key.der")))


def test_a_certificate_of_a_private_ca_needs_no_chain(ca: Ca) -> None:
    assert context_of(pair(ca)).minimum_version == ssl.TLSVersion.TLSv1_2


def test_one_that_will_expire_is_refused_only_then(ca: Ca) -> None:
    files = pair(ca)
    context_of(files)
    with pytest.raises(ConfigError, match="expired"):
        context_of(files, datetime.datetime.now(datetime.UTC) + 2 * DAY)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tls_certificate": "c.pem"}, "without tls_key"),
        ({"tls_key": "k.pem"}, "without tls_certificate"),
        ({"tls_client_ca": "ca.pem"}, "without tls_certificate"),
        ({"tls_certificate": "c.pem", "tls_key": "k.pem", "ingress": "serve"}, "end TLS in front"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FleetConfig(model="m", **settings)


def test_a_fleet_without_a_certificate_speaks_http() -> None:
    assert files_of(FleetConfig(model="m")) is None


# ---- a server


class Stream:
    """An app whose answer goes on until it is told to end."""

    def __init__(self) -> None:
        self.may_end = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-scheme", scope["scheme"].encode())]})
        await send({"type": "http.response.body", "body": b"first ", "more_body": True})
        await self.may_end.wait()
        await send({"type": "http.response.body", "body": b"last", "more_body": False})


class Server:
    def __init__(self, tls: ServerTls) -> None:
        self.app = Stream()
        self.listening = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            self.app, http=Connection, ws="none", lifespan="off", log_config=None,
            ssl_context_factory=lambda *_: tls.context,
        )  # fmt: skip
        self.uvicorn = uvicorn.Server(config)
        self.task = asyncio.create_task(self.uvicorn.serve(sockets=[self.listening]))

    async def open(self, client: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self.listening.getsockname()[1]
        return await asyncio.open_connection("127.0.0.1", port, ssl=client)

    async def close(self) -> None:
        self.uvicorn.should_exit = True
        await self.task


def client_of(ca: Ca, files: TlsFiles | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(ca.path))
    if files is not None:
        context.load_cert_chain(files.certificate, files.key)
    return context


def serial(writer: asyncio.StreamWriter) -> str:
    certificate = writer.get_extra_info("peercert")
    return str(certificate["serialNumber"])


async def test_a_new_certificate_serves_new_connections_and_breaks_no_stream(ca: Ca) -> None:
    files = pair(ca)
    tls = ServerTls(files)
    server = Server(tls)
    try:
        reader, writer = await server.open(client_of(ca))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        head = await reader.readuntil(b"first ")
        assert b"x-scheme: https" in head
        assert not tls.renew()  # nothing has changed
        assert pair(ca) == files
        assert tls.renew()
        after_reader, after = await server.open(client_of(ca))
        assert serial(after) != serial(writer)
        server.app.may_end.set()
        assert b"last" in await reader.readuntil(b"last")
        after.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"last" in await after_reader.readuntil(b"last")
        writer.close()
        after.close()
    finally:
        await server.close()


async def test_files_that_cannot_be_used_leave_the_certificate_before_in_use(
    ca: Ca, caplog: pytest.LogCaptureFixture
) -> None:
    files = pair(ca)
    tls = ServerTls(files)
    server = Server(tls)
    try:
        spoil(files)
        assert not tls.renew()
        assert "the one before stays in use" in caplog.text
        _, writer = await server.open(client_of(ca))
        writer.close()
        caplog.clear()
        assert not tls.renew()  # told once
        assert caplog.text == ""
        pair(ca)
        assert tls.renew()
    finally:
        await server.close()


async def test_only_clients_with_a_certificate_are_let_in(ca: Ca, tmp_path: Path) -> None:
    (tmp_path / "strange").mkdir()
    stranger = pair(Ca(tmp_path / "strange"))
    friend = pair(ca, name="friend")
    server = Server(ServerTls(TlsFiles(*map(str, ca.issue()), client_ca=str(ca.path))))
    server.app.may_end.set()
    try:
        for files in (None, stranger):
            with pytest.raises((ssl.SSLError, ConnectionError, asyncio.IncompleteReadError)):
                reader, writer = await server.open(client_of(ca, files))
                writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                await reader.readuntil(b"last")
        reader, writer = await server.open(client_of(ca, friend))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"200" in await reader.readuntil(b"last")
        writer.close()
    finally:
        await server.close()


async def test_old_tls_and_plain_http_get_no_answer(ca: Ca) -> None:
    server = Server(ServerTls(pair(ca)))
    try:
        old = client_of(ca)
        old.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await server.open(old)
        reader, writer = await asyncio.open_connection("127.0.0.1", server.listening.getsockname()[1])
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP" not in await reader.read()
        writer.close()
    finally:
        await server.close()


async def test_a_gateway_that_leaves_ends_its_encrypted_streams_first(ca: Ca, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kervan.gateway.leaving.LEAVE_S", 0.05)
    server = Server(ServerTls(pair(ca)))
    try:
        reader, writer = await server.open(client_of(ca))
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"first ")
        leaving = asyncio.create_task(send_clients_away(server.uvicorn, server.listening, timeout_s=30))
        await asyncio.sleep(0.2)
        assert not leaving.done()
        server.app.may_end.set()
        assert b"last" in await reader.readuntil(b"last")
        writer.close()
        await leaving
    finally:
        await server.close()
