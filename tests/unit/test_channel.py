"""Messages between the daemon's processes: what travels with them stays with who receives it."""

from __future__ import annotations

import os

from kdaemon.channel import MESSAGE_SIZE_MAX, Channel


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
