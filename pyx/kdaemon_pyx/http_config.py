"""What the HTTP file service can be told: plain values, checked here, copied into C structs by the service.

Everything is immutable; a changed configuration is a new service.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from urllib.parse import unquote

__all__ = ["SITE_BY_HOST", "HeaderRule", "Limits", "RedirectRule", "Site"]

SITE_BY_HOST = (
    1 << 30
)  # beside a site's number in Engine.install(): each request's Host chooses among its configuration's sites


def _check_pattern(what: str, pattern: str) -> None:
    if not pattern.startswith(("/", "*")) or "\0" in pattern:
        raise ValueError(f"{what} {pattern!r}: a path pattern begins with '/' or '*'")
    if pattern.count("*") > 1:
        raise ValueError(f"{what} {pattern!r}: one '*' at most")
    if "?" in pattern or "#" in pattern:
        raise ValueError(f"{what} {pattern!r}: a path has no query and no fragment; leave them out")
    if re.search("%[0-9A-Fa-f]{2}", pattern):
        raise ValueError(f"{what} {pattern!r}: paths are compared decoded; write {unquote(pattern)!r}")


# Fields that the server makes itself: a second one would contradict it, or end the message elsewhere than it ends.
_OWN_FIELDS = frozenset({
    "accept-ranges", "allow", "connection", "content-encoding", "content-length", "content-range", "content-type",
    "date", "etag", "keep-alive", "last-modified", "location", "server", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
HEADER_RULES_MAX = 32  # of one site; LINES_MAX in http_site.pxd
_HOST_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?|\[[0-9a-f:.]+\]")


def _check_name(name: str) -> None:
    if not name.isascii():
        try:
            raise ValueError(f"{name!r}: clients ask for {name.encode('idna').decode()!r}; write it so")
        except UnicodeError:
            raise ValueError(f"{name!r} is not a host name") from None
    if not _HOST_NAME.fullmatch(name.lower()):
        raise ValueError(
            f"{name!r} is not a host name: such as example.org or *.example.org, without scheme, port or path"
        )


def _check_line(what: str, text: str) -> None:
    if any(ord(c) < 0x20 or ord(c) == 0x7F for c in text):
        raise ValueError(f"{what} {text!r}: no control characters in a header")


@dataclass(frozen=True)
class HeaderRule:
    """Header fields of every response, errors included, whose path matches ``path`` ('*': any bytes).

    Where several rules match that name the same field, the last one counts; with an empty value the field is not sent.
    """

    path: str
    headers: tuple[tuple[str, str], ...]

    def __post_init__(self) -> None:
        _check_pattern("header rule", self.path)
        for name, value in self.headers:
            _check_line("header", name)
            _check_line(name, value)
            if not name or any(c in ' ()<>@,;:\\"/[]?={}' for c in name) or not name.isascii():
                raise ValueError(f"{name!r} is not a header field name (RFC 9110 section 5.1)")
            if name.lower() == "content-type":
                raise ValueError("Content-Type is set by [[media_type]], http.default_type and http.charset")
            if name.lower() in _OWN_FIELDS:
                raise ValueError(f"{name} is written by the server itself; leave it out")


@dataclass(frozen=True)
class RedirectRule:
    """Answers paths that match ``path`` with ``status`` and Location ``to``; '*' in ``to`` is what '*' stood for.

    The request's query goes along, behind a query of ``to`` and before its fragment.
    """

    path: str
    to: str
    status: int = 301

    def __post_init__(self) -> None:
        _check_pattern("redirect", self.path)
        if not self.to.startswith(("/", "http://", "https://")):
            raise ValueError(f"redirect to {self.to!r}: a path that begins with '/', or a whole address with https://")
        if any(not "!" <= c <= "~" for c in self.to):
            raise ValueError(f"redirect to {self.to!r}: percent-encode what is not printable ASCII")
        if self.status not in (301, 302, 303, 307, 308):
            raise ValueError(f"redirect {self.path!r}: status {self.status} is none of 301, 302, 303, 307, 308")
        if self.to.count("*") > self.path.count("*"):
            raise ValueError(f"redirect {self.path!r}: '*' in the target needs one in the path")


@dataclass(frozen=True)
class Site:
    """One folder and how it is served. ``root_fd`` stays the caller's, open as long as the service is.

    names: host names it answers for, "*.example.org" for one label more; () for every name that no other site has.
        A request for another: 421.
    index: names tried in a directory, in order.
    dotfiles: serve names that begin with a dot (".well-known" is always served).
    precompressed: offer FILE.zst, FILE.br and FILE.gz, where present and not older, by Accept-Encoding.
    listing: answer directories without an index with a listing (HTML, or JSON by Accept).
    fallback: path served with 200 in place of a 404, for single-page applications.
    error_pages: status -> path of the page served with that status.
    """

    root_fd: int
    names: tuple[str, ...] = ()
    index: tuple[str, ...] = ("index.html",)
    dotfiles: bool = False
    precompressed: bool = False
    listing: bool = False
    fallback: str | None = None
    error_pages: Mapping[int, str] = field(default_factory=dict)
    headers: tuple[HeaderRule, ...] = ()
    redirects: tuple[RedirectRule, ...] = ()

    def __post_init__(self) -> None:
        for name in self.names:
            _check_name(name)
        if sum(len(rule.headers) for rule in self.headers) > HEADER_RULES_MAX:
            raise ValueError(
                f"more than {HEADER_RULES_MAX} header rules in one site: merge some, with '*' in their paths"
            )
        for name in self.index:
            if not name or "/" in name or "\0" in name:
                raise ValueError(f"index {name!r}: a plain file name is needed")
        for path in [*([self.fallback] if self.fallback is not None else []), *self.error_pages.values()]:
            if not path.startswith("/") or path.endswith("/") or "\0" in path:
                raise ValueError(f"page {path!r}: the path of a file in the site is needed, beginning with '/'")
        for status in self.error_pages:
            if not 400 <= status <= 599:
                raise ValueError(f"error page for {status}: not an error status")


@dataclass(frozen=True)
class Limits:
    """What a client may make large or slow; the defaults are nginx's where it has them.

    Bytes and counts, as the names say; the deadlines (header, body, idle) are the engine's ``deadlines_ms``.
    head_bytes_max is bounded by what the connection keeps of unread input.
    """

    request_line_bytes_max: int = 8192  # beyond: 414
    header_line_bytes_max: int = 8192  # beyond: 431
    head_bytes_max: int = 32768  # beyond: 431
    header_count_max: int = 100  # beyond: 431
    body_bytes_max: int = 1 << 20  # beyond: 413
    requests_per_connection_max: int = 1000
    connection_age_ms_max: int = 3_600_000  # then its next response is its last
    connections_per_address_max: int = 0  # of one worker; beyond: closed at accept; 0: any number
    connections_per_second_per_address: int = 0  # likewise; as many may come at once
    requests_per_second_per_address: int = 0  # of one worker, as many may come at once; beyond: 429; 0: any number
    ranges_max: int = 16  # beyond: the whole file
    entries_max: int = 1024  # paths remembered, each with an open file
    entry_unused_ms: int = 60_000  # without being asked for: then it is forgotten, and its file closed
    content_bytes_max: int = 32 << 20  # of small files kept in memory
    content_file_bytes_max: int = 65536  # what a small file is

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not isinstance(value, int) or value < 0 or value >= 1 << 40:
                raise ValueError(f"{each.name} = {value!r}: a number from 0 is needed")
        for name in ("request_line_bytes_max", "header_line_bytes_max", "head_bytes_max"):
            if not 16 <= getattr(self, name) <= 60_000:  # a connection keeps 64 KiB of unread input
                raise ValueError(f"{name} = {getattr(self, name)}: from 16 to 60000 bytes")
        if not 1 <= self.header_count_max <= 10_000:
            raise ValueError(f"header_count_max = {self.header_count_max}: from 1 to 10000")
        if self.ranges_max > 64:
            raise ValueError(f"ranges_max = {self.ranges_max}: 64 at most")
        for name in [each.name for each in fields(self) if "per_address" in each.name]:
            if getattr(self, name) > 1_000_000:
                raise ValueError(f"{name} = {getattr(self, name)}: a million at most")
        if self.entries_max < 8:
            raise ValueError(f"entries_max = {self.entries_max}: 8 at least")
        if self.requests_per_connection_max < 1:
            raise ValueError("requests_per_connection_max: 1 at least")
