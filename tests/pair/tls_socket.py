"""Our engines over loopback sockets: a record layer of a few lines, a server in a thread."""

import socket
import threading
import time
from contextlib import contextmanager

from tls_pair import Direction, make_server, server_identity, sign_if_asked

from kdaemon.tls.constants import ContentType
from kdaemon.tls.errors import CloseNotifyReceived
from kdaemon.tls.key_schedule import SUITES
from kdaemon.tls.post_handshake import ConnectionSecrets, ControlState, handle_control_record, start_key_update
from kdaemon.tls.signing import Role

DEADLINE_S = 30
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\npong\n"


class Connection:
    """An established connection with a record layer in Python, for tests."""

    def __init__(self, handshake, sock, role):
        established = handshake.established
        self.sock, self.role, self.suite = sock, role, SUITES[established.cipher_suite]
        self.rx, self.tx = Direction(self.suite.code, established.rx), Direction(self.suite.code, established.tx)
        self.secrets = ConnectionSecrets(
            self.suite.code, established.tx.secret, established.rx.secret, established.resumption_secret
        )
        self.rx.reader.feed(established.leftover)
        self.state = ControlState()
        self.tickets, self.key_updates, self.closed = [], 0, False

    def send(self, data, content_type=ContentType.APPLICATION_DATA):
        self.sock.sendall(self.tx.writer.write(content_type, data))

    def update_keys(self):
        """A KeyUpdate of ours that asks for one in return."""
        reaction = start_key_update(self.secrets, request_update=True)
        self.send(reaction.messages, ContentType.HANDSHAKE)
        self.tx.writer.set_key(self.suite, reaction.tx.key, reaction.tx.iv)
        self.secrets = self.secrets._replace(tx_secret=reaction.tx.secret)

    def read(self):
        """The next application data; b"" at close_notify. Control records are followed on the way."""
        while True:
            buffer = self.rx.reader._buffer
            while len(buffer) < 5 or len(buffer) < 5 + int.from_bytes(buffer[3:5], "big"):
                data = self.sock.recv(65536)
                if not data:
                    return b""
                self.rx.reader.feed(data)
            content_type, content = self.rx.reader.open_one()
            if content_type == ContentType.APPLICATION_DATA:
                return content
            reaction = handle_control_record(
                self.role, content_type, content, self.secrets, state=self.state, now_s=time.time()
            )
            if isinstance(reaction.error, CloseNotifyReceived):
                self.closed = True
                return b""
            assert reaction.error is None
            self.tickets += reaction.tickets
            if reaction.rx:
                self.key_updates += 1
                self.rx.reader.set_key(self.suite, reaction.rx.key, reaction.rx.iv)
                self.secrets = self.secrets._replace(rx_secret=reaction.rx.secret)
            if reaction.messages:
                self.send(reaction.messages, ContentType.HANDSHAKE)
            if reaction.tx:
                self.tx.writer.set_key(self.suite, reaction.tx.key, reaction.tx.iv)
                self.secrets = self.secrets._replace(tx_secret=reaction.tx.secret)


def complete(handshake, sock, identity=None):
    """Drives a handshake over a socket."""
    while True:
        data = handshake.data_to_send()
        if data:
            sock.sendall(data)
        if handshake.complete:
            return
        received = sock.recv(65536)
        assert received, "the peer closed the connection in the handshake"
        handshake.receive(received)
        if identity is not None:
            sign_if_asked(handshake, identity)


@contextmanager
def our_server(config, connections=1):
    """A thread that answers each request with RESPONSE; yields (port, results)."""
    results, failures = [], []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(DEADLINE_S)

    def run():
        try:
            for _ in range(connections):
                sock, _ = listener.accept()
                with sock:
                    sock.settimeout(DEADLINE_S)
                    handshake = make_server(config)
                    complete(handshake, sock, server_identity())
                    connection = Connection(handshake, sock, Role.SERVER)
                    results.append((handshake.established, connection))
                    if connection.read():
                        connection.send(RESPONSE)
                    connection.send(b"\x01\x00", ContentType.ALERT)
                    connection.read()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listener.getsockname()[1], results
    finally:
        thread.join(DEADLINE_S)
        listener.close()
    assert not failures, failures
