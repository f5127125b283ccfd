"""Messages between the daemon's processes: what travels with them stays with who receives it."""

from __future__ import annotations

import os
import socket
import tracemalloc
from collections.abc import Callable

from kdaemon.channel import MESSAGE_SIZE_MAX, Channel
from kdaemon.key_client import KeyClient
from kdaemon.key_protocol import SIGNATURES, TICKET_KEYS, TicketKey, serialize_ticket_keys


def test_received_descriptors_are_not_inherited() -> None:
    """socket.recv_fds() of Python 3.11 ignores MSG_CMSG_CLOEXEC: every new zygote and worker got the ticket keys."""
    one, other = Channel.pair()
    reader, writer = os.pipe()
    one.send({"type": "a"}, (reader, writer))
    message, fds = other.receive()
    assert message == {"type": "a"} and len(fds) == 2
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in (reader, writer, *fds):
        os.close(fd)
    one.close()
    other.close()


def test_a_message_too_long_for_a_datagram_arrives_with_its_descriptors() -> None:
    one, other = Channel.pair()
    reader, writer = os.pipe()
    one.send({"text": "x" * MESSAGE_SIZE_MAX}, (reader,))
    message, (received,) = other.receive()
    assert len(message["text"]) == MESSAGE_SIZE_MAX
    os.write(writer, b"through")
    assert os.read(received, 16) == b"through"
    for fd in (reader, writer, received):
        os.close(fd)
    one.close()
    other.close()


def peak_bytes(function: Callable[[], object]) -> int:
    """Of memory that Python allocates meanwhile."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_small_message_does_not_cost_a_block_of_the_greatest_size() -> None:
    """Such blocks, given back in part each time, left heaps in pieces, which grew though little of them was in use."""
    one, other = Channel.pair()
    one.send({"type": "a"})
    assert peak_bytes(other.receive) < MESSAGE_SIZE_MAX // 8
    one.close()
    other.close()


def test_a_signature_does_not_cost_a_block_of_the_greatest_size() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    taken: list[TicketKey] = []
    client = KeyClient(lambda _connection, _signature: None, taken.extend, 10)
    channel = client.attach(ours)
    key = TicketKey(bytes(16), bytes(32), 0)
    theirs.send(bytes((TICKET_KEYS,)) + serialize_ticket_keys([key]))
    theirs.send(bytes((SIGNATURES,)))
    assert peak_bytes(lambda: client.readable(channel)) < MESSAGE_SIZE_MAX // 8
    assert taken == [key]
    client.lost(channel)
    theirs.close()
