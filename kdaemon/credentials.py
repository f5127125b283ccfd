"""Certificate chains and the private keys that belong to them. In the daemon it runs in keymgr only: nobody else there
reads a key. `kdaemon connect`, a program of its own, loads the one that it presents.

`Credential` here is a loaded pair; what leaves keymgr is its `describe()`: the public part.
"""

import dataclasses
import datetime
import hashlib
import ipaddress
import os
from base64 import b64decode, b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import ocsp
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, PublicKeyAlgorithmOID

from kdaemon.config import Certificate
from kdaemon.tls import signing
from kdaemon.tls.certificates import schemes_in_chain
from kdaemon.tls.errors import BadCertificate

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey

SELF_SIGNED_DAYS = 397
SELF_SIGNED_RENEW_DAYS = 30
_CHAIN_SIZE_MAX = 1 << 20


class CredentialError(Exception):
    """A certificate or key that cannot be used; one line: which file, what is wrong. Never quotes the key.

    `what`: which of the configuration's files it is: "chain", "key" or "ocsp".
    """

    def __init__(self, message: str, what: str = "chain") -> None:
        super().__init__(message)
        self.what = what


@dataclass(frozen=True, slots=True)
class Credential:
    """A certificate chain with its private key. The key is in no repr; who loaded it keeps it."""

    key_id: str  # SHA-256 of the SubjectPublicKeyInfo: the same key has the same name after a restart or reload
    chain_der: tuple[bytes, ...]
    schemes: tuple[int, ...]
    signed_with: tuple[tuple[int, ...], ...]  # schemes of the signatures in the chain
    names: tuple[str, ...]  # DNS names and IP addresses of the leaf
    private_key: PrivateKey = field(repr=False)
    ocsp: bytes = b""
    warnings: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """The public part, for workers, as plain values."""
        return {
            "key_id": self.key_id,
            "chain": [b64encode(certificate).decode() for certificate in self.chain_der],
            "schemes": list(self.schemes),
            "signed_with": [list(each) for each in self.signed_with],
            "names": list(self.names),
            "ocsp": b64encode(self.ocsp).decode(),
            "sha256": hashlib.sha256(self.chain_der[0]).hexdigest(),
            "warnings": list(self.warnings),
        }


def decode_chain(description: dict[str, Any]) -> list[bytes]:
    """The DER certificates of a describe()d credential, the leaf first."""
    return [b64decode(certificate) for certificate in description["chain"]]


def load_all(certificates: Sequence[Certificate], now: datetime.datetime | None = None) -> list[Credential]:
    """Loads every configured pair, or the self-signed one for localhost when there is none. Raises CredentialError."""
    if not certificates:
        return [load_self_signed(now=now)]
    return [load(certificate, now=now) for certificate in certificates]


def load(certificate: Certificate, now: datetime.datetime | None = None) -> Credential:
    """Loads a chain and its key and checks that they belong together. Raises CredentialError."""
    chain_path, key_path = Path(certificate.chain), Path(certificate.key)
    now = now or _now()
    try:
        chain = x509.load_pem_x509_certificates(_read(chain_path, "chain"))
        public_key = _public_bytes(chain[0].public_key())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CredentialError(f"{chain_path}: no certificate chain in PEM: {_first_line(error)}") from None
    private_key = _load_key(key_path)
    if _public_bytes(private_key.public_key()) != public_key:
        raise CredentialError(f"{key_path}: this key does not belong to the certificate in {chain_path}", "key")
    loaded = _credential(chain, private_key, str(chain_path), now)
    return _with_staple(loaded, Path(certificate.ocsp), chain[0], now) if certificate.ocsp else loaded


def load_self_signed(folder: Path | None = None, now: datetime.datetime | None = None) -> Credential:
    """The self-signed ECDSA P-256 certificate for localhost, 127.0.0.1 and ::1, kept in the user's state folder.

    Made when there is none, when it is damaged, and 30 days before it expires. Raises CredentialError.
    """
    folder = folder or state_folder()
    now = now or _now()
    path = folder / "localhost.pem"  # key and certificate in one file, so that they are replaced together
    try:
        data = path.read_bytes()
        chain = x509.load_pem_x509_certificates(data)
        key = serialization.load_pem_private_key(data, password=None)
        if (
            isinstance(key, ec.EllipticCurvePrivateKey)
            and _public_bytes(key.public_key()) == _public_bytes(chain[0].public_key())
            and chain[0].not_valid_after_utc - now > datetime.timedelta(days=SELF_SIGNED_RENEW_DAYS)
        ):
            _write_public(folder, chain[0])
            return _credential(chain, key, str(path), now)
    except (OSError, ValueError):
        pass  # none yet, or damaged: make another
    made = ec.generate_private_key(ec.SECP256R1())
    certificate = _self_signed(made, now)
    pem = made.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + certificate.public_bytes(serialization.Encoding.PEM)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        replace_file(path, pem, 0o600)
        _write_public(folder, certificate)
    except OSError as error:
        raise CredentialError(f"{path}: the self-signed certificate cannot be kept: {error.strerror}") from None
    return _credential([certificate], made, str(path), now)


def state_folder() -> Path:
    """$XDG_STATE_HOME/kdaemon, by default ~/.local/state/kdaemon."""
    state = os.environ.get("XDG_STATE_HOME")
    if not state or not Path(state).is_absolute():
        state = str(Path.home() / ".local" / "state")
    return Path(state) / "kdaemon"


def _write_public(folder: Path, certificate: x509.Certificate) -> None:
    """localhost.crt: the certificate alone, for `curl --cacert`."""
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    path = folder / "localhost.crt"
    try:
        if path.read_bytes() == pem:
            return
    except OSError:
        pass
    replace_file(path, pem, 0o644)


def replace_file(path: Path, data: bytes, mode: int) -> None:
    """Writes a file so that readers see the old or the new one, never a part, and never with wider permissions."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as file:
        file.write(data)
    temporary.replace(path)


def _self_signed(key: ec.EllipticCurvePrivateKey, now: datetime.datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kdaemon on localhost")])
    addresses = [x509.IPAddress(ipaddress.ip_address(address)) for address in ("127.0.0.1", "::1")]
    usage = {
        name: name == "digital_signature"
        for name in (
            "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
            "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
        )
    }  # fmt: skip
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=SELF_SIGNED_DAYS))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost"), *addresses]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA256())
    )


def _load_key(path: Path) -> PrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path, "key"), password=None)
    except TypeError:
        raise CredentialError(
            f"{path}: the key is encrypted; give it unencrypted and protect the file by its mode", "key"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise CredentialError(f"{path}: no private key in PEM", "key") from None  # the cause could quote key material
    if not isinstance(key, PrivateKey):
        raise CredentialError(
            f"{path}: a {type(key).__name__} cannot sign in TLS 1.3; use ECDSA, Ed25519 or RSA", "key"
        )
    return key


def _credential(chain: list[x509.Certificate], key: PrivateKey, where: str, now: datetime.datetime) -> Credential:
    leaf = chain[0]
    warnings = []
    if leaf.not_valid_after_utc < now:
        warnings.append(f"{where}: the certificate expired on {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
    if leaf.not_valid_before_utc > now:
        warnings.append(f"{where}: the certificate is not valid before {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC")
    names = _names(leaf)
    if not names:
        warnings.append(f"{where}: the certificate has no subjectAltName; clients will refuse it")
    # RFC 8446, section 4.2.3: rsa_pss_pss for keys of id-RSASSA-PSS, rsa_pss_rsae for those of rsaEncryption
    pss_only = leaf.public_key_algorithm_oid == PublicKeyAlgorithmOID.RSASSA_PSS
    schemes = signing.schemes_of_key(key, pss_only=pss_only)
    if not schemes:
        raise CredentialError(f"{where}: keys of this curve or size cannot sign in TLS 1.3")
    try:
        signed_with = schemes_in_chain(chain)
    except BadCertificate as error:
        raise CredentialError(f"{where}: {error}") from None
    return Credential(
        key_id=hashlib.sha256(_public_bytes(key.public_key())).hexdigest(),
        chain_der=tuple(certificate.public_bytes(serialization.Encoding.DER) for certificate in chain),
        schemes=schemes,
        signed_with=signed_with,
        names=names,
        private_key=key,
        warnings=tuple(warnings),
    )


def _with_staple(credential: Credential, path: Path, leaf: x509.Certificate, now: datetime.datetime) -> Credential:
    """`credential` with the OCSP response at `path`, and warnings of what clients will not like in it."""
    data = _read(path, "ocsp")
    try:
        response = ocsp.load_der_ocsp_response(data)
        problem = _staple_problem(response, leaf, now)
    except (ValueError, UnsupportedAlgorithm):
        raise CredentialError(f"{path}: no OCSP response in DER", "ocsp") from None
    warnings = credential.warnings + ((f"{path}: the OCSP response {problem}",) if problem else ())
    return dataclasses.replace(credential, ocsp=data, warnings=warnings)


def _staple_problem(response: ocsp.OCSPResponse, leaf: x509.Certificate, now: datetime.datetime) -> str:
    if response.response_status != ocsp.OCSPResponseStatus.SUCCESSFUL:
        return f"is an error: {response.response_status.name.lower()}"
    if response.serial_number != leaf.serial_number:
        return "is for another certificate"
    if response.certificate_status != ocsp.OCSPCertStatus.GOOD:
        return f"says that the certificate is {response.certificate_status.name.lower()}"
    if response.next_update_utc is not None and response.next_update_utc < now:
        return f"expired on {response.next_update_utc:%Y-%m-%d %H:%M} UTC"
    return ""


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    dns = [name.lower() for name in names.get_values_for_type(x509.DNSName)]
    return (*dns, *(str(address) for address in names.get_values_for_type(x509.IPAddress)))


def _public_bytes(key: Any) -> bytes:
    encoded: bytes = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return encoded


def _read(path: Path, what: str) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(_CHAIN_SIZE_MAX + 1)
    except OSError as error:
        raise CredentialError(f"{path}: cannot be read: {error.strerror}", what) from None
    if len(data) > _CHAIN_SIZE_MAX:
        raise CredentialError(f"{path}: longer than {_CHAIN_SIZE_MAX} bytes", what)
    return data


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
