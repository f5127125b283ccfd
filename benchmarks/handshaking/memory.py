"""The handshake engine beside Python's own ssl (OpenSSL), both in memory, on one core in one run.

Only the end that is compared is timed, by the CPU time of the thread: making the object, every call, and the signature.
Its peer is the same for both. Rounds alternate, and the table gives the median round. Both send one ticket. Handshakes
run in lockstep, a batch at a time, as a loaded server meets them; a batch of one is a server that is never busy, where
the peer, which is OpenSSL too, cools the caches for one of the two and warms them for the other.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tls_pair
from cryptography.hazmat.primitives import serialization
from kdaemon_pyx.hkdf import hmac_digest

from kdaemon.tls import key_schedule, signing
from kdaemon.tls.client import ClientHandshake
from kdaemon.tls.constants import NamedGroup
from kdaemon.tls.server import ServerHandshake
from kdaemon.worker import GC_THRESHOLD

GROUPS = (NamedGroup.X25519,)
MARKS = {"server-full-p256": 1.0, "server-resumed-p256": 1.0}
MARK = 0.8  # of all others


class SslEnd:
    """One end made of Python's ssl over memory BIOs."""

    def __init__(self, context: ssl.SSLContext, *, server_side: bool, session: Any = None) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        name = None if server_side else "localhost"
        self.object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_side, server_hostname=name, session=session
        )
        self.complete = False

    def step(self, data: bytes) -> bytes:
        if data:
            self._incoming.write(data)
        try:
            self.object.do_handshake()
            self.complete = True
        except ssl.SSLWantReadError:
            pass
        return self._outgoing.read()

    def take_session(self, data: bytes) -> Any:
        if data:
            self._incoming.write(data)
        try:
            self.object.read(1)
        except ssl.SSLWantReadError:
            pass
        return self.object.session


class ServerEnd:
    """Our server, signing at once."""

    def __init__(self, config: Any, key: Any) -> None:
        self._key = key
        self.handshake = ServerHandshake(config, random=os.urandom, now_s=time.time())
        self.complete = False

    def step(self, data: bytes) -> bytes:
        handshake = self.handshake
        handshake.receive(data)
        request = handshake.sign_request
        if request is not None:
            handshake.signature_ready(signing.sign(self._key, request.scheme, request.role, request.transcript_hash))
        self.complete = handshake.complete
        return handshake.data_to_send()


class ClientEnd:
    """Our client."""

    def __init__(self, config: Any, session: Any = None) -> None:
        self.handshake = ClientHandshake(config, "localhost", random=os.urandom, now_s=time.time(), session=session)
        self.complete = False

    def step(self, data: bytes) -> bytes:
        if data:
            self.handshake.receive(data)
        self.complete = self.handshake.complete
        return self.handshake.data_to_send()

    def take_session(self, data: bytes) -> Any:
        if data:
            self.handshake.receive(data)
        return tls_pair.receive_tickets(self.handshake)[0]


@dataclass
class Case:
    """What is timed (``ours`` and ``reference``, each given a session or None) and the peers they talk to."""

    name: str
    timed_is_server: bool
    resumed: bool
    ours: Callable[[Any], Any]
    reference: Callable[[Any], Any] | None  # None: this OpenSSL cannot do it
    peer_of_ours: Callable[[Any], Any]
    peer_of_reference: Callable[[Any], Any]


def handshakes(
    make_timed: Callable[[Any], Any], make_peer: Callable[[Any], Any], case: Case, sessions: list[Any]
) -> tuple[int, list[Any]]:
    """One handshake per session, in lockstep: (nanoseconds of the timed ends, sessions for the next round)."""
    clock = time.thread_time_ns
    server_timed = case.timed_is_server
    peers = [make_peer(None if not server_timed else session) for session in sessions]
    data = [peer.step(b"") if server_timed else b"" for peer in peers]
    start = clock()
    timed = [make_timed(session if not server_timed else None) for session in sessions]
    spent = clock() - start
    ends = list(zip(timed, peers, strict=True))
    while True:
        start = clock()
        data = [end.step(received) for end, received in zip(timed, data, strict=True)]
        spent += clock() - start
        if all(end.complete and peer.complete for end, peer in ends):
            break
        data = [peer.step(received) for peer, received in zip(peers, data, strict=True)]
        if all(end.complete and peer.complete for end, peer in ends):
            break
    if not case.resumed:
        return spent, sessions
    clients = peers if server_timed else timed
    return spent, [client.take_session(received) for client, received in zip(clients, data, strict=True)]


def run_round(
    make_timed: Callable[[Any], Any], make_peer: Callable[[Any], Any], case: Case, options: argparse.Namespace
) -> float:
    """Handshakes per CPU-second of the timed end."""
    _, sessions = handshakes(make_timed, make_peer, case, [None] * options.batch)
    count, spent = 0, 0
    deadline = time.monotonic() + options.seconds / options.rounds
    while time.monotonic() < deadline:
        nanoseconds, sessions = handshakes(make_timed, make_peer, case, sessions)
        spent += nanoseconds
        count += options.batch
    return count / (spent / 1e9)


def server_context(kind: str) -> ssl.SSLContext:
    identity = tls_pair.server_identity(kind)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 1
    with tempfile.NamedTemporaryFile() as file:
        file.write(
            identity.key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        file.write(identity.certificate.public_bytes(serialization.Encoding.PEM))
        file.flush()
        context.load_cert_chain(file.name)
    return context


def client_context(*, verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=tls_pair.authority().issuer_pem)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def make_cases() -> list[Case]:
    cases = []
    fast_client = client_context(verify=False)
    strict_client = client_context(verify=True)
    client_config = tls_pair.client_config(groups=GROUPS, key_share_groups=GROUPS, grease=False)
    for kind in tls_pair.KEY_KINDS:
        for resumed in (False, True):
            if resumed and kind != "p256":
                continue
            identity = tls_pair.server_identity(kind)
            context = server_context(kind)
            config = tls_pair.server_config(kind, ticket_keys=tls_pair.ticket_keys())
            suffix = f"{'resumed' if resumed else 'full'}-{kind}"
            ssl_client = lambda session: SslEnd(fast_client, server_side=False, session=session)  # noqa: E731
            ssl_server = lambda _, context=context: SslEnd(context, server_side=True)  # noqa: E731
            cases.append(
                Case(
                    f"server-{suffix}",
                    True,
                    resumed,
                    lambda _, config=config, identity=identity: ServerEnd(config, identity.key),
                    ssl_server,
                    ssl_client,
                    ssl_client,
                )
            )
            cases.append(
                Case(
                    f"client-{suffix}",
                    False,
                    resumed,
                    lambda session: ClientEnd(client_config, session),
                    lambda session: SslEnd(strict_client, server_side=False, session=session),
                    ssl_server,
                    ssl_server,
                )
            )
    hybrid = tls_pair.client_config(grease=False)
    identity, config = tls_pair.server_identity(), tls_pair.server_config(ticket_keys=tls_pair.ticket_keys())

    def server_end(_: Any) -> ServerEnd:
        return ServerEnd(config, identity.key)

    def client_end(session: Any) -> ClientEnd:
        return ClientEnd(hybrid, session)

    cases.append(Case("server-full-hybrid", True, False, server_end, None, client_end, client_end))
    cases.append(Case("client-full-hybrid", False, False, client_end, None, server_end, server_end))
    return cases


CASES = {case.name: case for case in make_cases()}


def profile(case: Case, options: argparse.Namespace) -> None:
    """Where our end's time goes."""
    profiler = cProfile.Profile()
    profiler.runcall(run_round, case.ours, case.peer_of_ours, case, options)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(45)


def measure(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """All rounds of one case; prints its row."""
    ours, reference = [], []
    for _ in range(options.rounds):
        ours.append(run_round(case.ours, case.peer_of_ours, case, options))
        if case.reference is not None:
            reference.append(run_round(case.reference, case.peer_of_reference, case, options))
    mine = statistics.median(ours)
    if case.reference is None:
        print(f"{case.name:24}{mine:10.0f}         -", flush=True)
        return {"case": case.name, "ours_per_s": ours}
    ratios = [mine / its for mine, its in zip(ours, reference, strict=True)]
    its, ratio, mark = statistics.median(reference), statistics.median(ratios), MARKS.get(case.name, MARK)
    verdict = f">= {mark:g} {'reached' if ratio >= mark else 'MISSED'}"
    print(
        f"{case.name:24}{mine:10.0f}{its:10.0f}{ratio:8.2f}{min(ratios):8.2f}{max(ratios):8.2f}  {verdict}", flush=True
    )
    return {"case": case.name, "ours_per_s": ours, "ssl_per_s": reference, "ratio": ratio, "mark": mark}


def run(names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    os.sched_setaffinity(0, {options.server_cpu})
    gc.set_threshold(*GC_THRESHOLD)  # as the worker does
    if not options.plain_hmac:
        key_schedule.use_hmac(hmac_digest)  # as the worker does
    if options.profile:
        profile(CASES[options.profile], options)
        return {}
    print(f"{ssl.OPENSSL_VERSION}; CPU {options.server_cpu}; {options.rounds} rounds, batches of {options.batch}")
    print(f"{'case':24}{'ours/s':>10}{'ssl/s':>10}{'ratio':>8}{'low':>8}{'high':>8}  mark")
    return {"openssl": ssl.OPENSSL_VERSION, "cases": [measure(CASES[name], options) for name in names]}
