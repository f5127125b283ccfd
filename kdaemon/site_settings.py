"""The part of the configuration that says what is served and how: sites, HTTP limits, media types, the access log.

Values only; `kdaemon.config` builds and checks them; the functions turn them into what the file service takes.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from kdaemon_pyx import http_config
from kdaemon_pyx.mime import MimeTable


class SettingError(ValueError):
    """A value that cannot be; `keys` lead to it from where the caller began."""

    def __init__(self, keys: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.keys = keys


@contextmanager
def _at(*keys: str | int) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise SettingError(keys, str(error)) from None


def bounded(default: int, minimum: int, maximum: int) -> int:
    """A dataclass field: an integer from `minimum` to `maximum`."""
    return field(default=default, metadata={"minimum": minimum, "maximum": maximum})


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    name: str
    value: str
    path: str = "*"  # one '*' stands for any characters


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirect:
    path: str
    to: str  # a '*' becomes what the '*' in path stood for
    status: int = 301


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorPage:
    status: int
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    root: str = field(metadata={"path": True})
    client_ca: str = field(default="", metadata={"path": True})  # PEM; empty: clients are not asked
    client_certificate: Literal["require", "request"] = "require"  # with client_ca
    names: tuple[str, ...] = ()  # server names it answers to; empty: every other name
    index: tuple[str, ...] = ("index.html",)
    dotfiles: bool = False
    precompressed: bool = False
    listing: bool = False
    fallback: str = ""
    error_page: tuple[ErrorPage, ...] = ()
    header: tuple[Header, ...] = ()
    redirect: tuple[Redirect, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Http:
    """Limits of requests; what they mean is told in kdaemon_pyx.http_config.Limits, whose defaults these are."""

    request_line_bytes_max: int = bounded(8192, 16, 60_000)
    header_line_bytes_max: int = bounded(8192, 16, 60_000)
    head_bytes_max: int = bounded(32768, 16, 60_000)
    header_count_max: int = bounded(100, 1, 10_000)
    body_bytes_max: int = bounded(1 << 20, 0, 1 << 39)
    requests_per_connection_max: int = bounded(1000, 1, 1 << 30)
    connection_age_ms_max: int = bounded(3_600_000, 100, 1 << 39)
    connections_per_address_max: int = bounded(0, 0, 1_000_000)
    connections_per_second_per_address: int = bounded(0, 0, 1_000_000)
    requests_per_second_per_address: int = bounded(0, 0, 1_000_000)
    ranges_max: int = bounded(16, 0, 64)
    entries_max: int = bounded(1024, 8, 1 << 20)
    entry_unused_ms: int = bounded(60_000, 0, 86_400_000)
    content_bytes_max: int = bounded(32 << 20, 0, 1 << 39)
    content_file_bytes_max: int = bounded(65536, 0, 1 << 30)
    default_type: str = "application/octet-stream"
    charset: str = ""  # of text types; empty: none is named


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaType:
    suffix: str
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessLog:
    path: str = field(default="", metadata={"path": True})  # empty: none
    format: Literal["combined", "json"] = "combined"


def site_rules(site: Site, root_fd: int) -> http_config.Site:
    """What the file service knows of `site`. Raises SettingError for rules that cannot be."""
    headers, redirects, pages = [], [], {}
    # A rule is made once for each of its keys, with the others as they may be, so that a complaint has the right one.
    for index, header in enumerate(site.header):
        with _at("header", index, "name"):
            http_config.HeaderRule("*", ((header.name, ""),))
        with _at("header", index, "value"):
            http_config.HeaderRule("*", ((header.name, header.value),))
        with _at("header", index, "path"):
            headers.append(http_config.HeaderRule(header.path, ((header.name, header.value),)))
    for index, redirect in enumerate(site.redirect):
        with _at("redirect", index, "path"):
            http_config.RedirectRule(redirect.path, "/")
        with _at("redirect", index, "to"):
            http_config.RedirectRule(redirect.path, redirect.to)
        with _at("redirect", index, "status"):
            redirects.append(http_config.RedirectRule(redirect.path, redirect.to, redirect.status))
    for index, page in enumerate(site.error_page):
        with _at("error_page", index, "status"):
            if page.status in pages:
                raise ValueError(f"status {page.status} has a page already")
            http_config.Site(root_fd, error_pages={page.status: "/page"})
        with _at("error_page", index, "path"):
            pages[page.status] = page.path
            http_config.Site(root_fd, error_pages=pages)
    rules: dict[str, Any] = {
        "names": site.names,
        "index": site.index,
        "fallback": site.fallback or None,
        "headers": tuple(headers),
    }
    for key, value in rules.items():
        with _at(key.replace("headers", "header")):
            http_config.Site(root_fd, **{key: value})
    return http_config.Site(
        root_fd,
        dotfiles=site.dotfiles,
        precompressed=site.precompressed,
        listing=site.listing,
        error_pages=pages,
        redirects=tuple(redirects),
        **rules,
    )


def check_names(sites: Iterable[Site]) -> None:
    """Raises SettingError, with the site's index first, where two sites want the same requests."""
    owners: dict[str, int] = {}
    for index, site in enumerate(sites):
        for name in [name.lower().rstrip(".") for name in site.names] or [""]:
            if owners.setdefault(name, index) != index:
                raise SettingError(
                    (index, "names"),
                    f"{name!r} is the name of another site, too" if name else "only one site may leave out names",
                )


def open_sites(sites: Iterable[Site]) -> list[http_config.Site]:
    """The sites with their folders opened, in order; the caller owns the descriptors. Raises OSError, ValueError."""
    return [site_rules(site, os.open(site.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) for site in sites]


def reopened(sites: Iterable[Site], before: list[http_config.Site]) -> list[http_config.Site]:
    """`before`, if the folders are still those; else as open_sites(): a link to a release may lead to the next one."""
    opened = open_sites(sites)
    pairs = zip(opened, before, strict=True)
    if all(os.path.sameopenfile(new.root_fd, old.root_fd) for new, old in pairs):
        for site in opened:
            os.close(site.root_fd)
        return before
    return opened


def http_limits(http: Http) -> http_config.Limits:
    """Raises ValueError."""
    return http_config.Limits(**{entry.name: getattr(http, entry.name) for entry in fields(http_config.Limits)})


def media_types(http: Http, types: Iterable[MediaType]) -> MimeTable:
    """Raises SettingError."""
    known = {}
    for index, entry in enumerate(types):
        known[entry.suffix] = entry.type
        with _at("media_type", index, "suffix"):
            MimeTable({entry.suffix: "text/plain"})
        with _at("media_type", index, "type"):
            MimeTable({entry.suffix: entry.type})
    with _at("http", "default_type"):
        MimeTable({}, http.default_type)
    with _at("http", "charset"):
        return MimeTable(known, http.default_type, http.charset)
