"""TLS between gateways: each draws a certificate at its start, and others know it by its digest from the directory.

An address of a gateway is `https://HOST:PORT#DIGEST`, or `HOST:PORT#DIGEST`: whoever connects sends nothing before the
other side has shown the certificate of that digest (SHA-256, hex), and the key never leaves the process. Who may
connect is proven inside of it (`auth`). No CA has a part in it, and no name or date, which nodes may disagree about.
"""

import asyncio
import contextlib
import datetime
import functools
import hashlib
import hmac
import http.client
import os
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

_NAME = "kervan gateway"
# Of no meaning here, as nobody checks them; a certificate must have them.
_BEGIN, _END = datetime.datetime(2020, 1, 1), datetime.datetime(9999, 1, 1)


@dataclass(frozen=True, slots=True)
class OwnCertificate:
    """A gateway's: the context for its listening sockets, and the digest by which others know it."""

    context: ssl.SSLContext
    digest: str


def draw() -> OwnCertificate:
    """A new key (P-256), and a certificate for it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, _NAME)])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), _BEGIN, _END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    # OpenSSL reads keys from files: one that is in memory only.
    file = os.memfd_create("kervan-key", os.MFD_CLOEXEC)
    try:
        os.write(file, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        os.write(file, certificate.public_bytes(Encoding.PEM))
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)
    return OwnCertificate(context, hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest())


def split(address: str) -> tuple[str, str]:
    """An address without its digest, and the digest; empty where the other side speaks plain text."""
    place, _, digest = address.partition("#")
    return place, digest


@functools.cache
def unchecked_context() -> ssl.SSLContext:
    """For a connection whose other side is then checked by `is_pinned`, and only by that."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def is_pinned(transport: asyncio.BaseTransport, digest: str) -> bool:
    """Whether the other side is the one of `digest`; without a digest, whether nothing was promised."""
    if not digest:
        return True
    tls = transport.get_extra_info("ssl_object")
    return tls is not None and _is_of(tls.getpeercert(binary_form=True), digest)


def get(address: str, path: str, *, headers: Mapping[str, str], timeout_s: float) -> bytes:
    """What a gateway answers at its internal address, for callers without an event loop.

    Raises: OSError, http.client.HTTPException; ConnectionError when it is another than the directory says, before
    anything is sent.
    """
    place, digest = split(address)
    server = urlsplit(place).netloc
    with contextlib.closing(
        http.client.HTTPSConnection(server, timeout=timeout_s, context=unchecked_context())
        if digest
        else http.client.HTTPConnection(server, timeout=timeout_s)
    ) as connection:
        connection.connect()
        if digest and not (
            isinstance(connection.sock, ssl.SSLSocket) and _is_of(connection.sock.getpeercert(True), digest)
        ):
            raise ConnectionError(f"{place} has another certificate than the directory says")
        connection.request("GET", path, headers=dict(headers))
        response = connection.getresponse()
        if response.status != http.HTTPStatus.OK:
            raise ConnectionError(f"HTTP {response.status} {response.reason}")
        return response.read()


def _is_of(certificate: bytes | None, digest: str) -> bool:
    return certificate is not None and hmac.compare_digest(hashlib.sha256(certificate).hexdigest(), digest)
