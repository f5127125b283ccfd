"""What workers and keymgr say to each other: batches of fixed-size signing requests, replies, and ticket keys.

One SOCK_SEQPACKET message holds a batch; its first byte says what it is:

- SIGN, worker to keymgr: `REQUEST` structures one behind the other, at most `BATCH_MAX`;
- SIGNATURES, keymgr to worker: for each request a `REPLY` header and the signature; length 0 means that it was refused;
- TICKET_KEYS, keymgr to worker, when it connects and when keys rotate: `TICKET_KEY` structures, the newest first.

Integers are little-endian. A request names what is to be signed by (role, scheme, key id, transcript hash) only:
keymgr builds the CertificateVerify content of RFC 8446, section 4.4.3 itself, so a worker cannot have anything else
signed.
"""

import struct
from dataclasses import dataclass

SIGN = 0x53
SIGNATURES = 0x56
TICKET_KEYS = 0x54

# request id, signature scheme, role, length of the transcript hash, key id, transcript hash (padded)
REQUEST = struct.Struct("<QHBB32s64s")
# request id, length of the signature that follows
REPLY = struct.Struct("<QH")
# name, key, when it was made (seconds since the epoch)
TICKET_KEY = struct.Struct("<16s32sQ")

BATCH_MAX = 64
MESSAGE_SIZE_MAX = 96 * 1024  # 64 RSA-8192 signatures fit

ROLE_SERVER = 0
ROLE_CLIENT = 1


@dataclass(frozen=True, slots=True)
class TicketKey:
    """A key that seals session tickets; `name` travels in the ticket, `key` never in a repr."""

    name: bytes  # 16 bytes
    key: bytes  # 32 bytes
    created_s: int

    def __repr__(self) -> str:
        return f"TicketKey(name={self.name.hex()}, created_s={self.created_s})"


def serialize_ticket_keys(keys: list[TicketKey]) -> bytes:
    """TICKET_KEY structures, one behind the other."""
    return b"".join(TICKET_KEY.pack(entry.name, entry.key, entry.created_s) for entry in keys)


def parse_ticket_keys(data: bytes | memoryview) -> list[TicketKey]:
    """The inverse of serialize_ticket_keys(). Raises ValueError."""
    if len(data) % TICKET_KEY.size:
        raise ValueError(f"{len(data)} bytes are no list of ticket keys")
    return [TicketKey(*fields) for fields in TICKET_KEY.iter_unpack(data)]
