"""TLS without TLS in the program: sockets, keys and handshakes live in kdaemon, reached through rings in shared memory.

    import libtls

    libtls.tls_init()
    with libtls.tls_wait(libtls.tls_open("example.org", 443)) as connection:
        connection.write(b"GET / HTTP/1.1\\r\\nHost: example.org\\r\\nConnection: close\\r\\n\\r\\n")
        print(connection.makefile().read().decode())

docs/libtls.md has the manual, docs/client-ring.md the rings themselves.
"""

from libtls.connection import Connection, Info, Listener
from libtls.errors import TlsError
from libtls.exchange import KtlsSocket, tls_adopt, tls_export
from libtls.functions import (
    tls_accept,
    tls_barrier,
    tls_close,
    tls_connect,
    tls_destroy,
    tls_init,
    tls_listen,
    tls_open,
    tls_oper_state_destroy,
    tls_read,
    tls_start,
    tls_try,
    tls_try_cancel,
    tls_wait,
    tls_write,
)
from libtls.operation import Lane, Operation

__all__ = [
    "Connection",
    "Info",
    "KtlsSocket",
    "Lane",
    "Listener",
    "Operation",
    "TlsError",
    "tls_accept",
    "tls_adopt",
    "tls_barrier",
    "tls_close",
    "tls_connect",
    "tls_destroy",
    "tls_export",
    "tls_init",
    "tls_listen",
    "tls_open",
    "tls_oper_state_destroy",
    "tls_read",
    "tls_start",
    "tls_try",
    "tls_try_cancel",
    "tls_wait",
    "tls_write",
]
