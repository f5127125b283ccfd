"""What the running kernel's TLS record layer (kTLS) can do, found by using it.

Kernel documents: Documentation/networking/tls.rst, include/uapi/linux/tls.h. Version numbers decide nothing here:
distributions backport, build without CONFIG_TLS, and leave cipher modules out. Every answer comes from sockets on the
loopback interface: the ULP is attached, keys are installed in both directions, and a record has to arrive.
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

# include/uapi/linux/tcp.h, include/linux/socket.h, include/uapi/linux/tls.h
TCP_ULP: Final = 31
SOL_TLS: Final = 282
TLS_TX: Final = 1
TLS_RX: Final = 2
TLS_TX_ZEROCOPY_RO: Final = 3
TLS_RX_EXPECT_NO_PAD: Final = 4
TLS_TX_MAX_PAYLOAD_LEN: Final = 5
TLS_1_3_VERSION: Final = 0x0304

# Cipher suite (RFC 8446, appendix B.4) -> (TLS_CIPHER_*, key, salt and iv length) of struct tls12_crypto_info_*.
CIPHERS: Final[dict[int, tuple[int, int, int, int]]] = {
    0x1301: (51, 16, 4, 8),  # TLS_AES_128_GCM_SHA256
    0x1302: (52, 32, 4, 8),  # TLS_AES_256_GCM_SHA384
    0x1303: (54, 32, 0, 12),  # TLS_CHACHA20_POLY1305_SHA256
}
SUITE_NAMES: Final = {
    0x1301: "TLS_AES_128_GCM_SHA256",
    0x1302: "TLS_AES_256_GCM_SHA384",
    0x1303: "TLS_CHACHA20_POLY1305_SHA256",
}
# Stands where a KtlsSupport.reason would, if the configuration says ktls = "off"
REASON_SWITCHED_OFF: Final = "switched-off"
_DEADLINE_S: Final = 5.0


@dataclass(frozen=True)
class KtlsSupport:
    """Result of probe().

    available: at least one cipher suite works in both directions.
    reason: one word for counters and the ready line: "available", "no-ulp", "forbidden", "no-cipher", "no-loopback".
        Of a connection also "record-size": the kernel cannot keep the peer's record_size_limit.
    detail: the same as a sentence, with the errno, for a person.
    suites: cipher suites usable for TLS_TX and TLS_RX. refused: the others, with the error the kernel gave.
    rekey: a second TLS_TX and TLS_RX are accepted, so a KeyUpdate can be followed (mainline since 6.14).
    expect_no_pad: TLS_RX_EXPECT_NO_PAD is accepted (since 6.0). tx_zerocopy_ro: so is TLS_TX_ZEROCOPY_RO (since 5.19).
    tx_max_payload: so is TLS_TX_MAX_PAYLOAD_LEN (since 6.19).
    """

    available: bool
    reason: str
    detail: str
    suites: frozenset[int] = frozenset()
    refused: dict[int, str] = field(default_factory=dict)
    rekey: bool = False
    expect_no_pad: bool = False
    tx_zerocopy_ro: bool = False
    tx_max_payload: bool = False


def crypto_info(cipher_suite: int, key: bytes, iv: bytes, sequence: int) -> bytes:
    """struct tls12_crypto_info_* for TLS 1.3: the 12-byte write IV (RFC 8446, section 5.3) is the kernel's salt and iv.

    Raises KeyError for a cipher suite that is not in CIPHERS, ValueError for a key or iv of the wrong length.
    """
    cipher_type, key_length, salt_length, iv_length = CIPHERS[cipher_suite]
    if len(key) != key_length or len(iv) != salt_length + iv_length:
        raise ValueError(f"{SUITE_NAMES[cipher_suite]} takes a key of {key_length} bytes and an iv of 12")
    salt, rest = iv[:salt_length], iv[salt_length:]
    return struct.pack("=HH", TLS_1_3_VERSION, cipher_type) + rest + key + salt + struct.pack(">Q", sequence)


def available_ulps() -> list[str]:
    """/proc/sys/net/ipv4/tcp_available_ulp: the ULPs loaded now; empty where the kernel has none."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text().split()
    except OSError:
        return []


def tls_stat() -> dict[str, int]:
    """/proc/net/tls_stat of this network namespace (tls.rst, "Statistics"); empty without kTLS."""
    try:
        lines = Path("/proc/net/tls_stat").read_text().splitlines()
    except OSError:
        return {}
    return {name: int(value) for name, value in (line.split() for line in lines)}


@contextlib.contextmanager
def _pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two connected TCP sockets on the loopback interface. Raises OSError where there is none."""
    try:
        listener = socket.create_server(("127.0.0.1", 0))
    except OSError:
        listener = socket.create_server(("::1", 0), family=socket.AF_INET6)
    with listener:
        listener.settimeout(_DEADLINE_S)
        with socket.create_connection(listener.getsockname()[:2], timeout=_DEADLINE_S) as sender:
            receiver, _ = listener.accept()
            with receiver:
                receiver.settimeout(_DEADLINE_S)
                yield sender, receiver


def _attach(*sockets: socket.socket) -> None:
    for each in sockets:
        each.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")


def _random_info(cipher_suite: int) -> bytes:
    return crypto_info(cipher_suite, os.urandom(CIPHERS[cipher_suite][1]), os.urandom(12), 0)


def _carries_a_record(cipher_suite: int) -> None:
    """Raises OSError where TLS_TX or TLS_RX is refused or the record does not arrive whole."""
    with _pair() as (sender, receiver):
        _attach(sender, receiver)
        info = _random_info(cipher_suite)
        sender.setsockopt(SOL_TLS, TLS_TX, info)
        receiver.setsockopt(SOL_TLS, TLS_RX, info)
        record = os.urandom(64)
        sender.sendall(record)
        if receiver.recv(len(record), socket.MSG_WAITALL) != record:
            raise OSError(errno.EBADMSG, "a record arrived changed")


def _can_rekey(cipher_suite: int) -> bool:
    with _pair() as (sender, receiver):
        _attach(sender, receiver)
        try:
            for _ in range(2):
                info = _random_info(cipher_suite)
                sender.setsockopt(SOL_TLS, TLS_TX, info)
                receiver.setsockopt(SOL_TLS, TLS_RX, info)
        except OSError:  # EBUSY: keys once only
            return False
        return True


def _accepts(option: int, value: bytes, cipher_suite: int) -> bool:
    with _pair() as (sender, receiver):
        _attach(sender, receiver)
        info = _random_info(cipher_suite)
        sender.setsockopt(SOL_TLS, TLS_TX, info)
        receiver.setsockopt(SOL_TLS, TLS_RX, info)
        try:
            (receiver if option == TLS_RX_EXPECT_NO_PAD else sender).setsockopt(SOL_TLS, option, value)
        except OSError:
            return False
        return True


def _without_ulp(error: OSError) -> KtlsSupport:
    name = errno.errorcode.get(error.errno or 0, str(error.errno))
    if error.errno in (errno.EPERM, errno.EACCES):
        return KtlsSupport(False, "forbidden", f'setsockopt(TCP_ULP, "tls") is forbidden here ({name})')
    return KtlsSupport(False, "no-ulp", f'the kernel has no TLS upper-layer protocol: TCP_ULP "tls" gives {name}')


def probe() -> KtlsSupport:
    """Tries everything and says what works; raises nothing. Takes milliseconds: for one call at start.

    May load kernel modules: a privileged caller's TCP_ULP makes the kernel ask for tcp-ulp-tls.
    """
    try:
        with _pair() as (sender, _):
            try:
                _attach(sender)
            except OSError as error:
                return _without_ulp(error)
    except OSError as error:
        return KtlsSupport(False, "no-loopback", f"no loopback TCP connection to try kTLS on: {error}")

    suites = set()
    refused = {}
    for cipher_suite in CIPHERS:
        try:
            _carries_a_record(cipher_suite)
        except OSError as error:
            refused[cipher_suite] = f"{errno.errorcode.get(error.errno or 0, 'timeout')}: {error.strerror or error}"
        else:
            suites.add(cipher_suite)
    if not suites:
        names = ", ".join(f"{SUITE_NAMES[suite]} {why}" for suite, why in refused.items())
        return KtlsSupport(False, "no-cipher", f"the kernel takes none of the cipher suites: {names}", refused=refused)
    one = min(suites)
    return KtlsSupport(
        available=True,
        reason="available",
        detail="the kernel encrypts and decrypts " + ", ".join(SUITE_NAMES[suite] for suite in sorted(suites)),
        suites=frozenset(suites),
        refused=refused,
        rekey=_can_rekey(one),
        expect_no_pad=_accepts(TLS_RX_EXPECT_NO_PAD, struct.pack("=I", 1), one),
        tx_zerocopy_ro=_accepts(TLS_TX_ZEROCOPY_RO, struct.pack("=I", 1), one),
        tx_max_payload=_accepts(TLS_TX_MAX_PAYLOAD_LEN, struct.pack("=H", 4096), one),
    )
