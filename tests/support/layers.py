"""What the kernel says of a socket: its record layer (the ULP of INET_DIAG, as `ss -i` shows it) and its state."""

from __future__ import annotations

import socket
import struct
from typing import Any

from pyroute2 import DiagSocket

# linux/inet_diag.h and linux/tls.h
_ULP_NAME, _ULP_TLS = 1, 2
_TLS_TXCONF, _TLS_RXCONF = 3, 4
_CONF_SOFTWARE = 2
_CLOSE_WAIT = 8
_ALL_STATES = 0xFFF
_ALL_EXTENSIONS = 0xFF


def record_layer(local: tuple[str, int], remote: tuple[str, int]) -> str:
    """Of the IPv4 socket with these ends, its own first: "kernel" where TLS has its keys in both directions, "none"
    without a ULP or before the keys. Raises LookupError if there is no such socket.
    """
    return _layer(_socket(local, remote))


def has_end(local: tuple[str, int], remote: tuple[str, int]) -> bool:
    """Whether the FIN of the other end has reached the socket. Raises LookupError if there is no such socket."""
    return int(_socket(local, remote)["idiag_state"]) == _CLOSE_WAIT


def _socket(local: tuple[str, int], remote: tuple[str, int]) -> Any:
    with DiagSocket() as diag:
        diag.bind()
        sockets = list(diag.get_sock_stats(family=socket.AF_INET, states=_ALL_STATES, extensions=_ALL_EXTENSIONS))
    for message in sockets:
        ends = (message["idiag_src"], message["idiag_sport"]), (message["idiag_dst"], message["idiag_dport"])
        if ends == (local, remote):
            return message
    raise LookupError(f"no socket {local} -> {remote}")


def _layer(message: Any) -> str:
    text = message.get_attr("INET_DIAG_ULP_INFO")
    if text is None:
        return "none"
    ulp = _attributes(bytes.fromhex(text.replace(":", "")))
    name = ulp[_ULP_NAME].rstrip(b"\0").decode()
    if name != "tls":
        return name
    tls = _attributes(ulp.get(_ULP_TLS, b""))
    conf = [int.from_bytes(tls.get(kind, b""), "little") for kind in (_TLS_TXCONF, _TLS_RXCONF)]
    if conf == [_CONF_SOFTWARE, _CONF_SOFTWARE]:
        return "kernel"
    return "half" if _CONF_SOFTWARE in conf else "none"


def _attributes(data: bytes) -> dict[int, bytes]:
    """Netlink attributes by type (linux/netlink.h)."""
    found = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        found[kind & 0x3FFF] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found
