"""Certificates for the embedded servers: without them anybody on this machine could list and read objects, and anybody
on the network between login and compute nodes could listen.

One authority and one certificate per home, known to nobody else. The authority's key is thrown away once it has signed.
"""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from edif_hpc.core.endpoints import AUTHORITY
from edif_hpc.core.errors import ComponentError
from edif_hpc.core.home import Home

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.x509 import Certificate, GeneralName, KeyUsage

VALID_DAYS = 3650
LOCAL_NAMES = ("localhost", "127.0.0.1")
ISSUER = "edif-hpc authority"


@dataclass(frozen=True)
class Files:
    """Where the PEM files lie."""

    authority: Path
    certificate: Path
    key: Path


def ensure(folder: Path, address: str = "") -> Files:
    """The certificates of a home, made on first use, and made anew when they lack the `address` it is reached at."""
    files = Files(folder / AUTHORITY, folder / "certificate.pem", folder / "certificate-key.pem")
    # The key is written last: once it is there, all are.
    if not files.key.exists() or (address and address not in names_of(files.certificate)):
        files.key.unlink(missing_ok=True)
        _make(files, address)
    return files


def names_of(certificate: Path) -> list[str]:
    """The host names and addresses that a certificate is for."""
    check_installed()
    from cryptography import x509

    found = x509.load_pem_x509_certificate(certificate.read_bytes())
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]


def check_installed() -> None:
    """Raise ComponentError without the library that makes certificates, which the small install leaves out."""
    if find_spec("cryptography") is None:
        raise ComponentError(
            "The embedded servers need the package cryptography; install edif-hpc[local], or set store.endpoint and "
            "redis.url."
        )


def _make(files: Files, address: str) -> None:
    check_installed()
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    authority_key = ec.generate_private_key(ec.SECP256R1())
    key = ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    names = [*LOCAL_NAMES, *([address] if address else [])]
    authority = _certificate(ISSUER, authority_key.public_key(), authority_key, None)
    certificate = _certificate("edif-hpc", key.public_key(), authority_key, names)
    text = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    Home.write_private(files.authority, authority.public_bytes(pem).decode())
    Home.write_private(files.certificate, certificate.public_bytes(pem).decode())
    Home.write_private(files.key, text.decode())


def _certificate(
    name: str, public: EllipticCurvePublicKey, signer: EllipticCurvePrivateKey, names: list[str] | None
) -> Certificate:
    """A certificate for these host names and addresses; without any, the authority's own."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.x509.oid import NameOID

    def named(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    now = datetime.datetime.now(datetime.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(named(name))
        .issuer_name(named(ISSUER))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(names is None, None), critical=True)
        # Python 3.13 verifies strictly: it wants to see whose key signed, and that this one may.
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
        .add_extension(_usage(signs=names is None), critical=True)
    )
    if names is not None:
        alternatives = x509.SubjectAlternativeName([_general_name(each) for each in names])
        built = built.add_extension(alternatives, critical=False)
    return built.sign(signer, hashes.SHA256())


def _usage(*, signs: bool) -> KeyUsage:
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not signs, key_cert_sign=signs, crl_sign=signs, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general_name(name: str) -> GeneralName:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
