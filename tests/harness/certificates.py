"""A CA of a test's own, and what it issues: real certificates, drawn anew in each run."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import AuthorityInformationAccessOID, ExtendedKeyUsageOID, NameOID

DAY = datetime.timedelta(days=1)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


class Ca:
    """Issues certificates; `path` has its own, for clients."""

    def __init__(self, directory: Path, name: str = "root", issuer: "Ca | None" = None) -> None:
        self.directory = directory
        self.name = _name(name)
        self.issuer = issuer
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = self._sign(self.name, self.key.public_key(), issuer or self, is_ca=True)
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    @staticmethod
    def _sign(
        subject: x509.Name,
        public_key: ec.EllipticCurvePublicKey,
        issuer: "Ca",
        *,
        is_ca: bool,
        hosts: tuple[str, ...] = (),
        starts_in: datetime.timedelta = -DAY,
        ends_in: datetime.timedelta = DAY,
        issuer_url: str = "",
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer.name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + starts_in)
            .not_valid_after(now + ends_in)
            .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
        )
        if hosts:
            names = [
                x509.IPAddress(ipaddress.ip_address(host)) if host[0].isdigit() else x509.DNSName(host)
                for host in hosts
            ]  # fmt: skip
            usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        if issuer_url:
            access = x509.AccessDescription(
                AuthorityInformationAccessOID.CA_ISSUERS, x509.UniformResourceIdentifier(issuer_url)
            )
            builder = builder.add_extension(x509.AuthorityInformationAccess([access]), critical=False)
        return builder.sign(issuer.key, hashes.SHA256())

    def issue(
        self,
        name: str = "server",
        hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
        *,
        password: bytes | None = None,
        has_chain: bool = True,
        starts_in: datetime.timedelta = -DAY,
        ends_in: datetime.timedelta = DAY,
        issuer_url: str = "",
    ) -> tuple[Path, Path]:
        """The files of a certificate, with those up to the root, and of its key. Written in place."""
        key = ec.generate_private_key(ec.SECP256R1())
        own = self._sign(
            _name(name),
            key.public_key(),
            self,
            is_ca=False,
            hosts=hosts,
            starts_in=starts_in,
            ends_in=ends_in,
            issuer_url=issuer_url,
        )
        chain, above = [own], self
        while has_chain and above.issuer is not None:
            chain.append(above.certificate)
            above = above.issuer
        certificate_path, key_path = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        pem = serialization.Encoding.PEM
        certificate_path.write_bytes(b"".join(part.public_bytes(pem) for part in chain))
        kept = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
        key_path.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, kept))
        return certificate_path, key_path
