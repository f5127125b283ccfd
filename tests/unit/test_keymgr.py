"""keymgr as a real process, driven over its real channel; what it signs, what it refuses, what outlives it."""

import hashlib
import os
import pwd
import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from support.certificates import Issued
from support.waiting import DEADLINE_S

from kdaemon import process
from kdaemon.channel import Channel
from kdaemon.config import Certificate, Config, Users, to_mapping
from kdaemon.key_client import KeyClient
from kdaemon.key_protocol import REQUEST, ROLE_CLIENT, ROLE_SERVER, SIGN, TicketKey, parse_ticket_keys
from kdaemon.keymgr import TicketKeyStore

ECDSA = 0x0403


class Keymgr:
    """The supervisor's part of a keymgr process."""

    def __init__(self, config: Config, *fds: int) -> None:
        self.channel, theirs = Channel.pair()
        self.channel.socket.settimeout(DEADLINE_S)
        self.pid = process.spawn_module("kdaemon.keymgr", theirs.fileno())
        theirs.close()
        self.channel.send({"type": "start", "config": to_mapping(config), "supervisor": os.getpid()}, fds)
        self.answer, self.fds = self.channel.receive()
        self.reaped = False

    def attach(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.send({"type": "attach", "worker": 0}, (theirs.fileno(),))
        theirs.close()
        return ours

    def kill(self) -> None:
        os.kill(self.pid, 9)
        self.wait()

    def wait(self) -> int:
        pidfd = os.pidfd_open(self.pid)
        readable, _, _ = select.select([pidfd], [], [], DEADLINE_S)
        os.close(pidfd)
        assert readable, "keymgr does not end"
        self.reaped = True
        return os.waitpid(self.pid, 0)[1]

    def close(self) -> None:
        self.channel.close()
        if not self.reaped:
            self.wait()
        for fd in self.fds:
            os.close(fd)


@pytest.fixture
def start(issued: Issued) -> Iterator[Callable[..., Keymgr]]:
    started: list[Keymgr] = []
    certificate = Certificate(chain=str(issued.certificate), key=str(issued.key))

    def function(*fds: int, certificate: Certificate = certificate, users: Users | None = None) -> Keymgr:
        started.append(Keymgr(Config(certificate=(certificate,), users=users or Users()), *fds))
        return started[-1]

    yield function
    for keymgr in started:
        keymgr.close()


class Client:
    """A KeyClient with what it was told, and its event loop."""

    def __init__(self) -> None:
        self.signatures: dict[int, bytes] = {}
        self.ticket_keys: list[TicketKey] = []
        self.keys = KeyClient(self.signatures.__setitem__, self._take, DEADLINE_S)

    def _take(self, keys: list[TicketKey]) -> None:
        self.ticket_keys = keys

    def serve(self, channel: object, until: Callable[[], bool]) -> bool:
        """Runs the channel until the condition holds; False when the channel ends before."""
        while not until():
            self.keys.flush()
            readable, _, _ = select.select([channel], [], [], DEADLINE_S)
            assert readable, "keymgr does not answer"
            if not self.keys.readable(channel):  # type: ignore[arg-type]
                self.keys.lost(channel)  # type: ignore[arg-type]
                return until()
        return True


def verify(issued: Issued, signature: bytes, prefix: bytes, transcript_hash: bytes) -> None:
    public_key = issued.x509.public_key()
    assert isinstance(public_key, ec.EllipticCurvePublicKey)
    public_key.verify(signature, b" " * 64 + prefix + b"\0" + transcript_hash, ec.ECDSA(hashes.SHA256()))


def key_id(keymgr: Keymgr) -> bytes:
    return bytes.fromhex(keymgr.answer["credentials"][0]["key_id"])


def test_a_batch_is_signed_in_the_terms_of_certificate_verify(start: Callable[..., Keymgr], issued: Issued) -> None:
    keymgr, client = start(), Client()
    channel = client.keys.attach(keymgr.attach())
    hashes_ = {number: hashlib.sha256(bytes([number])).digest() for number in range(200)}
    for number, transcript_hash in hashes_.items():
        role = ROLE_CLIENT if number % 2 else ROLE_SERVER
        client.keys.request(number, key_id(keymgr), ECDSA, role, transcript_hash)
    assert client.serve(channel, lambda: len(client.signatures) == 200)
    for number, transcript_hash in hashes_.items():
        prefix = f"TLS 1.3, {'client' if number % 2 else 'server'} CertificateVerify".encode()
        verify(issued, client.signatures[number], prefix, transcript_hash)


@pytest.mark.parametrize(
    ("scheme", "role", "length", "own_key"),
    [(0x0804, 0, 32, True), (ECDSA, 7, 32, True), (ECDSA, 0, 31, True), (ECDSA, 0, 0, True), (ECDSA, 0, 32, False)],
    ids=["scheme of another key", "no role", "no hash length", "empty", "unknown key"],
)
def test_what_is_no_handshake_is_refused(
    start: Callable[..., Keymgr], scheme: int, role: int, length: int, own_key: bool
) -> None:
    keymgr, client = start(), Client()
    channel = client.keys.attach(keymgr.attach())
    client.keys.request(1, key_id(keymgr) if own_key else bytes(32), scheme, role, bytes(length))
    client.keys.request(2, key_id(keymgr), ECDSA, ROLE_SERVER, bytes(32))
    assert client.serve(channel, lambda: len(client.signatures) == 2)
    assert client.signatures[1] == b""
    assert client.signatures[2] != b""


@pytest.mark.parametrize("message", [b"", b"?", bytes((SIGN,)) + bytes(REQUEST.size - 1)])
def test_a_worker_that_breaks_the_protocol_is_cut_off_alone(start: Callable[..., Keymgr], message: bytes) -> None:
    keymgr, client = start(), Client()
    broken, channel = keymgr.attach(), client.keys.attach(keymgr.attach())
    broken.settimeout(DEADLINE_S)
    assert parse_ticket_keys(broken.recv(4096)[1:])
    broken.send(message)
    assert broken.recv(4096) == b""
    broken.close()
    client.keys.request(1, key_id(keymgr), ECDSA, ROLE_SERVER, bytes(32))
    assert client.serve(channel, lambda: 1 in client.signatures)


def test_requests_outlive_a_killed_keymgr(start: Callable[..., Keymgr], issued: Issued) -> None:
    first, client = start(), Client()
    channel = client.keys.attach(first.attach())
    client.serve(channel, lambda: bool(client.ticket_keys))
    os.kill(first.pid, 19)  # SIGSTOP: requests reach its socket and are never answered
    for number in range(100):
        client.keys.request(number, key_id(first), ECDSA, ROLE_SERVER, bytes(32))
    client.keys.flush()
    first.kill()
    assert not client.serve(channel, lambda: bool(client.signatures))
    second = start()
    channel = client.keys.attach(second.attach())
    assert client.serve(channel, lambda: len(client.signatures) == 100)
    verify(issued, client.signatures[99], b"TLS 1.3, server CertificateVerify", bytes(32))


def test_a_retired_keymgr_answers_what_it_owes_and_leaves(start: Callable[..., Keymgr]) -> None:
    keymgr, client = start(), Client()
    channel = client.keys.attach(keymgr.attach())
    client.keys.request(1, key_id(keymgr), ECDSA, ROLE_SERVER, bytes(32))
    client.keys.flush()
    keymgr.channel.send({"type": "retire"})
    successor = start()
    client.keys.attach(successor.attach())
    assert client.serve(channel, lambda: 1 in client.signatures)
    assert client.signatures[1]
    client.keys.lost(channel)
    assert keymgr.wait() == 0


def test_ticket_keys_outlive_keymgr(start: Callable[..., Keymgr]) -> None:
    first, client = start(), Client()
    client.serve(client.keys.attach(first.attach()), lambda: bool(client.ticket_keys))
    before = client.ticket_keys
    first.kill()
    second = start(*first.fds)
    client.ticket_keys = []
    client.serve(client.keys.attach(second.attach()), lambda: bool(client.ticket_keys))
    assert client.ticket_keys == before
    assert before[0].key.hex() not in repr(before)


def test_ticket_keys_rotate_and_expire() -> None:
    store = TicketKeyStore(None, rotation_s=100, lifetime_s=200)
    try:
        assert store.rotate(1000.0)
        assert not store.rotate(1099.0)
        assert store.next_rotation_s(1099.0) == 1.0
        assert store.rotate(1100.0)
        assert [key.created_s for key in store.keys] == [1100, 1000]
        assert store.rotate(1299.0)
        assert [key.created_s for key in store.keys] == [1299, 1100, 1000]
        assert store.rotate(1300.0), "the first key has opened tickets for their whole lifetime"
        assert [key.created_s for key in store.keys] == [1299, 1100]
        again = TicketKeyStore(os.dup(store.fd), rotation_s=100, lifetime_s=200)
        assert again.keys == store.keys
        os.close(again.fd)
    finally:
        os.close(store.fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change to another user")
def test_keymgr_gives_up_root_and_cannot_be_dumped(start: Callable[..., Keymgr]) -> None:
    keymgr = start(users=Users(keymgr="nobody"))
    proc = Path(f"/proc/{keymgr.pid}")
    status = dict(line.split(":\t", 1) for line in (proc / "status").read_text().splitlines())
    nobody = str(pwd.getpwnam("nobody").pw_uid)
    assert status["Uid"].split() == [nobody] * 4
    assert status["CapEff"] == "0000000000000000"
    assert status["NoNewPrivs"] == "1"
    limits = (proc / "limits").read_text().splitlines()
    assert next(line for line in limits if line.startswith("Max core file size")).split()[4:6] == ["0", "0"]
    # proc(5): the files of a process belong to its user, unless it is not dumpable: then to root
    assert (proc / "environ").stat().st_uid == 0


def test_an_account_that_does_not_exist_is_named(start: Callable[..., Keymgr]) -> None:
    if os.geteuid() == 0:
        keymgr = start(users=Users(keymgr="no-such-account"))
        assert keymgr.answer == {"type": "failed", "reason": "no account is named 'no-such-account'"}


def test_bad_credentials_are_reported_in_one_line(start: Callable[..., Keymgr], tmp_path: Path) -> None:
    keymgr = start(certificate=Certificate(chain=str(tmp_path / "none.pem"), key=str(tmp_path / "none.key")))
    assert keymgr.answer["type"] == "failed"
    assert "none.pem: cannot be read: No such file" in keymgr.answer["reason"]
    assert os.waitstatus_to_exitcode(keymgr.wait()) == 2


def test_a_request_that_nobody_answers_fails_at_its_deadline() -> None:
    answers: dict[int, bytes] = {}
    keys = KeyClient(answers.__setitem__, lambda _: None, 5.0)
    keys.request(7, bytes(32), ECDSA, ROLE_SERVER, bytes(32))
    deadline = keys.expire(0.0)
    assert deadline is not None
    assert not answers
    assert keys.expire(deadline) is None
    assert answers == {7: b""}
