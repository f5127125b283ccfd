"""The part of the configuration that says what is served and how: sites, HTTP limits, media types, the access log.

Values only; `kdaemon.config` builds and checks them; the functions turn them into what the file service takes.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Literal

from kdaemon_pyx import http_config
from kdaemon_pyx.mime import MimeTable


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

    request_line_bytes_max: int = 8192
    header_line_bytes_max: int = 8192
    head_bytes_max: int = 32768
    header_count_max: int = 100
    body_bytes_max: int = 1 << 20
    requests_per_connection_max: int = 1000
    connections_per_address_max: int = 0
    connections_per_second_per_address: int = 0
    requests_per_second_per_address: int = 0
    ranges_max: int = 16
    entries_max: int = 1024
    entry_unused_ms: int = 60_000
    content_bytes_max: int = 32 << 20
    content_file_bytes_max: int = 65536
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
    """What the file service knows of `site`. Raises ValueError for rules that cannot be."""
    return http_config.Site(
        root_fd,
        names=site.names,
        index=site.index,
        dotfiles=site.dotfiles,
        precompressed=site.precompressed,
        listing=site.listing,
        fallback=site.fallback or None,
        error_pages={page.status: page.path for page in site.error_page},
        headers=tuple(http_config.HeaderRule(rule.path, ((rule.name, rule.value),)) for rule in site.header),
        redirects=tuple(http_config.RedirectRule(rule.path, rule.to, rule.status) for rule in site.redirect),
    )


def open_sites(sites: Iterable[Site]) -> list[http_config.Site]:
    """The sites with their folders opened, in order; the caller owns the descriptors. Raises OSError, ValueError."""
    return [site_rules(site, os.open(site.root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) for site in sites]


def http_limits(http: Http) -> http_config.Limits:
    """Raises ValueError."""
    return http_config.Limits(**{entry.name: getattr(http, entry.name) for entry in fields(http_config.Limits)})


def media_types(http: Http, types: Iterable[MediaType]) -> MimeTable:
    """Raises ValueError."""
    return MimeTable({entry.suffix: entry.type for entry in types}, http.default_type, http.charset)
