"""Certificates that servers present to libtls programs, each thing wrong an error of its own, and those of programs."""

from __future__ import annotations

import contextlib
import datetime
import errno
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from support.certificates import Issued, issue, make_key, write_key
from support.daemon import Daemon, serve
from support.waiting import DEADLINE_S

from libtls import Lane, errors
from libtls.functions import tls_connect, tls_open, tls_start


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Issued:
    """The daemon's own, for programs that are clients."""
    return issue(tmp_path_factory.mktemp("client"), names=["client.test"], client_only=True, intermediates=1)


@pytest.fixture(scope="module", params=["off", pytest.param("require", marks=pytest.mark.guest)])
def daemon(
    request: pytest.FixtureRequest, issued: Issued, client: Issued, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("site")
    configuration = directory / "kdaemon.toml"
    configuration.write_text(
        f'workers = 1\nktls = "{request.param}"\n'
        + "".join(f'[[certificate]]\nchain = "{own.certificate}"\nkey = "{own.key}"\n' for own in (issued, client))
    )
    with serve(directory, "--config", str(configuration), ends_by_itself=True) as daemon:
        daemon.issued = issued
        yield daemon
        daemon.stop()


@pytest.fixture
def lane(daemon: Daemon) -> Iterator[Lane]:
    lane = Lane.attach(daemon.socket_path)
    yield lane
    lane.close()


def self_signed(directory: Path) -> Issued:
    """For localhost, by itself."""
    key = make_key("ecdsa-p256")
    name = x509.Name([x509.NameAttribute(x509.oid.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    path = directory / "self-signed.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return Issued(path, write_key(directory / "self-signed.key", key), path, certificate)


@contextlib.contextmanager
def presenting(issued: Issued) -> Iterator[int]:
    """A TLS server with this certificate, by Python's ssl; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def run() -> None:
            with contextlib.suppress(OSError):
                while True:
                    taken, _ = listener.accept()
                    with contextlib.suppress(OSError), taken:
                        context.wrap_socket(taken, server_side=True).close()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)


def refused(lane: Lane, presented: Issued, trusted: Path) -> errors.TlsError:
    with presenting(presented) as port, pytest.raises(errors.TlsError) as failure:
        tls_open("localhost", port, cafile=trusted, lane=lane).wait(DEADLINE_S)
    assert failure.value.errno == errno.EKEYREJECTED
    return failure.value


def test_expired_certificate(lane: Lane, make_issued: Callable[..., Issued]) -> None:
    issued = make_issued(expired=True)
    assert type(refused(lane, issued, issued.ca)) is errors.CertificateExpired


def test_certificate_of_another_name(lane: Lane, make_issued: Callable[..., Issued]) -> None:
    issued = make_issued(names=("other.example",))
    assert type(refused(lane, issued, issued.ca)) is errors.CertificateNameMismatch


def test_certificate_of_an_unknown_authority(lane: Lane, make_issued: Callable[..., Issued]) -> None:
    assert type(refused(lane, make_issued(), make_issued().ca)) is errors.CertificateUntrusted


def test_self_signed_certificate(lane: Lane, make_issued: Callable[..., Issued], tmp_path: Path) -> None:
    assert type(refused(lane, self_signed(tmp_path), make_issued().ca)) is errors.CertificateSelfSigned


def test_bad_certificate(lane: Lane, make_issued: Callable[..., Issued]) -> None:
    """It may not be used by a server."""
    issued = make_issued(client_only=True)
    assert type(refused(lane, issued, issued.ca)) is errors.CertificateBad


def test_a_trusted_self_signed_certificate_is_accepted(lane: Lane, tmp_path: Path) -> None:
    issued = self_signed(tmp_path)
    with presenting(issued) as port:
        tls_open("localhost", port, cafile=issued.ca, lane=lane).wait(DEADLINE_S).close()


@pytest.mark.parametrize(
    "pem", [b"not a certificate", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
)
def test_trust_anchors_that_are_none(daemon: Daemon, lane: Lane, pem: bytes) -> None:
    with pytest.raises(errors.TlsError) as failure:
        tls_open("localhost", daemon.port, cadata=pem, lane=lane).wait(DEADLINE_S)
    assert failure.value.errno == errno.EINVAL


# What libtls programs present


@pytest.fixture
def asking(issued: Issued, client: Issued) -> Iterator[socket.socket]:
    """A TLS server by Python's ssl that insists on a certificate of the client's authority, and says its names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.certificate, issued.key)
    context.load_verify_locations(client.ca)
    context.verify_mode = ssl.CERT_REQUIRED

    def run(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                taken, _ = listener.accept()
                with contextlib.suppress(OSError), taken, context.wrap_socket(taken, server_side=True) as tls:
                    presented = tls.getpeercert()
                    assert presented is not None
                    tls.sendall(repr(presented["subjectAltName"]).encode())

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=run, args=(listener,), daemon=True)
        thread.start()
        yield listener
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(DEADLINE_S)


def test_a_client_presents_a_certificate_of_the_daemons(daemon: Daemon, lane: Lane, asking: socket.socket) -> None:
    """Named by the program, as OPEN and as START_TLS; its key signs where it is."""
    port = asking.getsockname()[1]
    opened = tls_open("localhost", port, certificate="client.test", cafile=daemon.ca, lane=lane).wait(DEADLINE_S)
    started = tls_connect("localhost", port, lane=lane).wait(DEADLINE_S)
    tls_start(started, "localhost", certificate="Client.Test", cafile=daemon.ca).wait(DEADLINE_S)
    for connection in (opened, started):
        assert connection.read(timeout=DEADLINE_S) == b"(('DNS', 'client.test'),)"
        connection.close()


def test_a_client_presents_nothing_that_it_did_not_name(daemon: Daemon, lane: Lane, asking: socket.socket) -> None:
    port = asking.getsockname()[1]
    with tls_open("localhost", port, cafile=daemon.ca, lane=lane).wait(DEADLINE_S) as connection:
        with pytest.raises(errors.AlertReceived) as failure:
            connection.read(timeout=DEADLINE_S)
        assert failure.value.alert == 116  # certificate_required
    for name in ("other.test", "*.test"):
        with pytest.raises(errors.TlsError, match="no certificate of this name") as refused:
            tls_open("localhost", port, certificate=name, cafile=daemon.ca, lane=lane).wait(DEADLINE_S)
        assert refused.value.errno == errno.ENOENT
