"""HTTP libraries through the daemon: httpx (a network backend for httpcore) and requests (an adapter for urllib3).

Each part needs its library, which libtls does not depend on.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx
import requests.adapters
import urllib3
import urllib3.connection

from libtls.connection import Connection
from libtls.functions import current_lane, tls_connect, tls_start
from libtls.operation import Lane, Operation
from libtls.sock import TlsSocket


class Stream(httpcore.NetworkStream):
    """A connection of `Backend`, without TLS until `start_tls`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._socket = TlsSocket(connection)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._socket.settimeout(timeout)
        try:
            return self._socket.recv(max_bytes)
        except TimeoutError as error:
            raise httpcore.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.ReadError(str(error)) from error

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._socket.settimeout(timeout)
        try:
            self._socket.sendall(buffer)
        except TimeoutError as error:
            raise httpcore.WriteTimeout(str(error)) from error
        except OSError as error:
            raise httpcore.WriteError(str(error)) from error

    def close(self) -> None:
        self._socket.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> Stream:
        """The context says whom to trust; everything else is the daemon's."""
        try:
            self._socket.stop_reading_ahead()
            start(self._connection, ssl_context, server_hostname, timeout).wait()
        except OSError as error:
            self.close()
            raise connect_error(error) from error
        return self

    def get_extra_info(self, info: str) -> Any:
        return self._socket.readable() if info == "is_readable" else None


class Backend(httpcore.NetworkBackend):
    """For `httpcore.ConnectionPool(network_backend=...)`."""

    def __init__(self, lane: Lane | None = None) -> None:
        self._lane = lane

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Stream:
        lane = self._lane or current_lane()
        try:
            return Stream(tls_connect(host, port, timeout=timeout, lane=lane).wait())
        except OSError as error:
            raise connect_error(error) from error


def start(
    connection: Connection, context: ssl.SSLContext, server_hostname: str | None, timeout: float | None
) -> Operation[Connection]:
    """START_TLS as httpcore asks for it."""
    return tls_start(
        connection,
        server_hostname or "",
        alpn=["http/1.1"],
        cadata=_anchors(context),
        insecure=context.verify_mode == ssl.CERT_NONE,
        timeout=timeout,
    )


def connect_error(error: OSError) -> Exception:
    """httpcore's exception for a connection that was not made."""
    kind = httpcore.ConnectTimeout if isinstance(error, TimeoutError) else httpcore.ConnectError
    return kind(str(error))


def _anchors(context: ssl.SSLContext) -> bytes:
    """The certificates that a context trusts, as PEM; empty: those that it would find by itself, the system's."""
    return "".join(ssl.DER_cert_to_PEM_cert(der) for der in context.get_ca_certs(binary_form=True)).encode()


def httpx_transport(
    lane: Lane | None = None, verify: ssl.SSLContext | bool = True, proxy: str | None = None
) -> httpx.HTTPTransport:
    """For `httpx.Client(transport=...)`: its connections are the daemon's. verify: as of httpx.

    proxy: "http://host:port", asked by CONNECT for a way to the server; TLS is then made through it.
    """
    transport = httpx.HTTPTransport(verify=verify)
    context = transport._pool._ssl_context
    if proxy:
        transport._pool = httpcore.HTTPProxy(proxy, ssl_context=context, network_backend=Backend(lane))
    else:
        transport._pool = httpcore.ConnectionPool(ssl_context=context, network_backend=Backend(lane))
    return transport


class _HTTPSConnection(urllib3.connection.HTTPSConnection):
    """urllib3's connection with the daemon's socket."""

    lane: Lane | None = None

    def connect(self) -> None:
        self.sock: Any = TlsSocket.open(
            self.host,
            self.port or 443,
            server_name=self.server_hostname,
            alpn=["http/1.1"],
            cafile=self.ca_certs,
            insecure=self.cert_reqs in ("CERT_NONE", ssl.CERT_NONE),
            timeout=self.timeout if isinstance(self.timeout, float | int) else None,
            lane=self.lane,
        )
        self.is_verified = True

    @property
    def is_connected(self) -> bool:
        return self.sock is not None and not self.sock.readable()


class RequestsAdapter(requests.adapters.HTTPAdapter):
    """For `requests.Session.mount("https://", ...)`: its connections are the daemon's."""

    def __init__(self, lane: Lane | None = None, **options: Any) -> None:
        self._connection_class = type("HTTPSConnection", (_HTTPSConnection,), {"lane": lane})
        super().__init__(**options)

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
        super().init_poolmanager(*arguments, **keywords)
        pool = type("Pool", (urllib3.HTTPSConnectionPool,), {"ConnectionCls": self._connection_class})
        self.poolmanager.pool_classes_by_scheme = {"http": urllib3.HTTPConnectionPool, "https": pool}
