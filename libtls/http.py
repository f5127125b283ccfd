"""HTTP libraries through the daemon: httpx (a network backend for httpcore) and requests (an adapter for urllib3).

Each part needs its library, which libtls does not depend on.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx
import requests.adapters
import urllib3
import urllib3.connection

from libtls.connection import Connection
from libtls.errors import HandshakeError, NameNotResolved
from libtls.functions import current_lane, tls_connect
from libtls.operation import Lane
from libtls.sock import TlsSocket


class Stream(httpcore.NetworkStream):
    """A connection of `Backend`, without TLS until `start_tls`."""

    def __init__(self, connection: Connection) -> None:
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
        self._socket.settimeout(timeout)
        try:
            self._socket.start_tls(server_hostname or "", **tls_options(ssl_context))
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


def tls_options(context: ssl.SSLContext) -> dict[str, Any]:
    """What `tls_start` is given for HTTP with this context."""
    return {"alpn": ["http/1.1"], "cadata": _anchors(context), "insecure": context.verify_mode == ssl.CERT_NONE}


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
    """urllib3's connection with the daemon's socket, and with urllib3's own exceptions."""

    lane: Lane | None = None

    def connect(self) -> None:
        self._refuse_what_cannot_be()
        timeout = self.timeout if isinstance(self.timeout, float | int) else None
        try:
            operation = tls_connect(self.host, self.port or 443, timeout=timeout, lane=self.lane or current_lane())
            self.sock: Any = TlsSocket(operation.wait())
            self.sock.settimeout(timeout)
            if tunnel := getattr(self, "_tunnel_host", None):
                self._tunnel()
                self._has_connected_to_proxy = True
            self.sock.start_tls(self.server_hostname or tunnel or self.host, **self._tls_options())
            if self.assert_fingerprint:
                urllib3.util.ssl_.assert_fingerprint(self.sock.getpeercert(binary_form=True), self.assert_fingerprint)
        except TimeoutError as error:
            raise urllib3.exceptions.ConnectTimeoutError(self, str(error)) from error
        except HandshakeError as error:
            raise urllib3.exceptions.SSLError(error) from error
        except NameNotResolved as error:
            raise urllib3.exceptions.NameResolutionError(self.host, self, socket.gaierror(str(error))) from error
        except OSError as error:
            raise urllib3.exceptions.NewConnectionError(self, str(error)) from error
        self.is_verified = True

    def _tls_options(self) -> dict[str, Any]:
        if self.ssl_context is not None and not (self.ca_certs or self.ca_cert_data):
            return tls_options(self.ssl_context)
        cadata = self.ca_cert_data.encode() if isinstance(self.ca_cert_data, str) else self.ca_cert_data
        insecure = self.cert_reqs in ("CERT_NONE", ssl.CERT_NONE)
        return {"alpn": ["http/1.1"], "cafile": self.ca_certs, "cadata": cadata, "insecure": insecure}

    def _refuse_what_cannot_be(self) -> None:
        """Rather than to do less than was asked for."""
        if self.cert_file or self.key_file:
            raise urllib3.exceptions.SSLError("a client's certificate: its key would have to leave this program")
        if self.ca_cert_dir and not self.ca_certs:
            raise urllib3.exceptions.SSLError("a directory of authorities: give the daemon one file")
        if self.proxy is not None and self.proxy.scheme == "https":
            raise urllib3.exceptions.SSLError("a proxy that wants TLS for itself: TLS within TLS")

    @property
    def is_connected(self) -> bool:
        return self.sock is not None and not self.sock.readable()


class _Pool(urllib3.HTTPSConnectionPool):
    def _put_conn(self, conn: Any) -> None:
        if conn is not None and conn.sock is not None:
            conn.sock.readable()  # asks now, so that `is_connected` knows when the connection is wanted again
        super()._put_conn(conn)


class RequestsAdapter(requests.adapters.HTTPAdapter):
    """For `requests.Session.mount("https://", ...)`: its connections are the daemon's, through CONNECT proxies too."""

    def __init__(self, lane: Lane | None = None, **options: Any) -> None:
        connection = type("HTTPSConnection", (_HTTPSConnection,), {"lane": lane})
        self._pools = {
            "http": urllib3.HTTPConnectionPool,
            "https": type("HTTPSConnectionPool", (_Pool,), {"ConnectionCls": connection}),
        }
        super().__init__(**options)

    def init_poolmanager(self, *arguments: Any, **keywords: Any) -> None:
        super().init_poolmanager(*arguments, **keywords)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *arguments: Any, **keywords: Any) -> Any:
        manager = super().proxy_manager_for(*arguments, **keywords)
        manager.pool_classes_by_scheme = self._pools
        return manager
