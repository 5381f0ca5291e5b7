"""Certificates for the embedded store: without them anybody on this machine could list and read objects.

One authority and one certificate per home, known to nobody else. The authority's key is thrown away once it has signed.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.x509 import Certificate

VALID_DAYS = 3650


@dataclass(frozen=True)
class Files:
    """Where the PEM files lie."""

    authority: Path
    certificate: Path
    key: Path


def ensure(folder: Path) -> Files:
    """The certificates of a home, made on first use."""
    files = Files(folder / "store-authority.pem", folder / "store-certificate.pem", folder / "store-key.pem")
    # The key is written last: once it is there, all are.
    if not files.key.exists():
        _make(files)
    return files


def check_installed() -> None:
    """Raise ComponentError without the library that makes certificates, which the small install leaves out."""
    if find_spec("cryptography") is None:
        raise ComponentError(
            "The embedded store needs the package cryptography; install edif-hpc[local], or set store.endpoint."
        )


def _make(files: Files) -> None:
    check_installed()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    authority = _certificate("edif-hpc store authority", authority_key.public_key(), authority_key, authority=True)
    certificate = _certificate("edif-hpc store", key.public_key(), authority_key, authority=False)
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Home.write_private(files.authority, authority.public_bytes(pem).decode())
    Home.write_private(files.certificate, certificate.public_bytes(pem).decode())
    Home.write_private(files.key, text.decode())


def _certificate(
    name: str, public: EllipticCurvePublicKey, signer: EllipticCurvePrivateKey, *, authority: bool
) -> Certificate:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    return (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named("edif-hpc store authority"))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(signer, hashes.SHA256())
    )
