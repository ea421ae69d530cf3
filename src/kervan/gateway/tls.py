"""TLS towards clients: the certificate, whether it can be used, and its renewal while the gateway runs."""

import datetime
import itertools
import logging
import os
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kervan.config.fleet import FleetConfig
from kervan.errors import ConfigError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

logger = logging.getLogger(__name__)

LOOK_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths on the gateway's node. `certificate`: PEM, the server's own first, then those up to its root, without it.

    `client_ca`: PEM of those whose clients are let in; empty: clients need no certificate.
    """

    certificate: str
    key: str
    client_ca: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(filter(None, (self.certificate, self.key, self.client_ca)))


def files_of(config: FleetConfig) -> TlsFiles | None:
    """Those that a fleet's settings name, if they do."""
    return TlsFiles(config.tls_certificate, config.tls_key, config.tls_client_ca) if config.tls_certificate else None


def context_of(files: TlsFiles, now: datetime.datetime | None = None) -> ssl.SSLContext:
    """A server's context, of TLS 1.2 or newer. `now`: with a time zone; by default the present.

    Raises: ConfigError, in one line with the fix, for files that clients or OpenSSL would not take.
    """
    certificates = _read_certificates(files.certificate, "tls_certificate")
    _check(certificates, files.certificate, now or datetime.datetime.now(datetime.UTC))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, files)
    if files.client_ca:
        _read_certificates(files.client_ca, "tls_client_ca")
        context.load_verify_locations(files.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def _load_pair(context: ssl.SSLContext, files: TlsFiles) -> None:
    _read(files.key, "tls_key")

    def no_password() -> str:
        raise ConfigError(
            f"tls_key {files.key} is encrypted, and nobody is there to give its password; write it without one: "
            f"openssl pkey -in {files.key} -out KEY, for kervan alone to read"
        )

    try:
        context.load_cert_chain(files.certificate, files.key, no_password)
    except ssl.SSLError as error:
        if error.reason in ("KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"):
            raise ConfigError(
                f"tls_key {files.key} is not the key of the first certificate in {files.certificate}; give the key "
                "that its request was made with, and put the server's own certificate first"
            ) from error
        reason = f" ({error.reason})" if error.reason else ""
        raise ConfigError(
            f"tls_key {files.key} holds no private key in PEM that OpenSSL can use{reason}; give the file that begins "
            "with -----BEGIN PRIVATE KEY-----"
        ) from error


def _read(path: str, setting: str) -> bytes:
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe may never end
            raise ConfigError(f"{setting} {path} is a directory or no regular file; give the file itself, in PEM")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ConfigError(
            f"{setting} {path} does not exist on {os.uname().nodename}; the gateways of each node read it there"
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{setting} {path} cannot be read on {os.uname().nodename} ({error.strerror}); give the user that runs "
            "kervan the right to"
        ) from error


def _read_certificates(path: str, setting: str) -> "list[Certificate]":
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(_read(path, setting))
    except ValueError as error:
        raise ConfigError(
            f"{setting} {path} holds no certificate in PEM; give the file that begins with -----BEGIN CERTIFICATE-----"
        ) from error


def _check(certificates: "list[Certificate]", path: str, now: datetime.datetime) -> None:
    """Raises: ConfigError for certificates that clients would refuse."""
    from cryptography import x509

    own = certificates[0]
    subject = f"tls_certificate {path} ({own.subject.rfc4514_string() or 'without a subject'})"
    if now > own.not_valid_after_utc:
        raise ConfigError(f"{subject} expired on {own.not_valid_after_utc:%Y-%m-%d %H:%M} UTC; renew it")
    if now < own.not_valid_before_utc:
        raise ConfigError(
            f"{subject} is valid from {own.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and it is {now:%Y-%m-%d %H:%M} "
            "here; wait, or set the clock"
        )
    try:
        own.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound as error:
        raise ConfigError(
            f"{subject} names no host (it has no subjectAltName), so clients refuse it; have it made for the name by "
            "which they come"
        ) from error
    for below, above in itertools.pairwise(certificates):
        if below.issuer != above.subject:
            raise ConfigError(
                f"tls_certificate {path} is out of order: {below.subject.rfc4514_string()} was issued by "
                f"{below.issuer.rfc4514_string()}, and {above.subject.rfc4514_string()} follows it; put the server's "
                "own first, then each one's issuer"
            )
    if _lacks_issuer(certificates[-1]):
        raise ConfigError(
            f"tls_certificate {path} ends with {certificates[-1].subject.rfc4514_string()}, whose issuer "
            f"{certificates[-1].issuer.rfc4514_string()} is no root here, so clients cannot check it; append the "
            "issuer's certificate (many CAs call such a file fullchain.pem)"
        )


def _lacks_issuer(last: "Certificate") -> bool:
    """Whether a certificate of a public CA, which says where its issuer's is, is followed by no root of this machine.

    Those of private CAs say nothing of that, and their clients may know the issuer itself.
    """
    from cryptography import x509
    from cryptography.x509.oid import AuthorityInformationAccessOID

    if last.issuer == last.subject:
        return False
    try:
        access = last.extensions.get_extension_for_class(x509.AuthorityInformationAccess).value
    except x509.ExtensionNotFound:
        return False
    if not any(entry.access_method == AuthorityInformationAccessOID.CA_ISSUERS for entry in access):
        return False
    issuer = last.issuer.public_bytes()
    return not any(issuer in root for root in ssl.create_default_context().get_ca_certs(binary_form=True))


class ServerTls:
    """The context that a listening socket uses, kept as its files are. Connections that are open go on as they are.

    Raises: ConfigError, when it is made, as `context_of`.
    """

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self._seen = _stamps(files)
        self.context = context_of(files)

    def renew(self) -> bool:
        """Take the files if they have changed, for connections from now on; whether they were taken.

        Files that cannot be used, or are half written, change nothing; the log says why. A CA for clients that is
        taken out of its file is known until the gateway starts anew.
        """
        stamps = _stamps(self.files)
        if stamps == self._seen:
            return False
        self._seen = stamps
        try:
            context_of(self.files)  # apart from the one in use, which must stay whole
            self.context.load_cert_chain(self.files.certificate, self.files.key)
            if self.files.client_ca:
                self.context.load_verify_locations(self.files.client_ca)
        except (ConfigError, OSError) as error:  # ssl.SSLError is one
            logger.error("the certificate is not renewed, and the one before stays in use: %s", error)
            return False
        logger.info("new connections get the certificate that is in %s now", self.files.certificate)
        return True


def _stamps(files: TlsFiles) -> tuple[tuple[int, int, int] | None, ...]:
    """What changes when a file is written, or a link to it is moved, as Kubernetes does with secrets."""

    def stamp(path: str) -> tuple[int, int, int] | None:
        try:
            status = Path(path).stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_size

    return tuple(map(stamp, files.paths))
