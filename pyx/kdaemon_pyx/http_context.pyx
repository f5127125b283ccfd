"""What the HTTP sessions of one engine thread share: sites, limits, the file table, counters."""

import os
import resource

from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memset

from kdaemon_pyx.files cimport LIST_FILES, LIST_NAMES, file_table_setup, file_table_teardown
from kdaemon_pyx.http_address cimport address_table_setup, address_table_teardown
from kdaemon_pyx.http_log cimport AccessLog
from kdaemon_pyx.http_site cimport SiteTable
from kdaemon_pyx.mime cimport MimeTable

from kdaemon_pyx.http_config import Limits

__all__ = ["FileContext"]


cdef class FileContext:
    """Sites, limits and the file table of one engine thread.

    sites: sequence of ``http_config.Site``, in the order of the engine's site numbers; their root_fd stay the caller's and must outlive
    this object. limits: ``http_config.Limits``. mime: ``mime.MimeTable``, may be shared.
    log: an ``http_log.AccessLog`` of its own, or None.

    Raises ValueError for values that do not fit, MemoryError. Thread-safety: ``counters`` from any thread, the rest is the engine's.
    """

    def __cinit__(self, sites, limits=None, mime=None, AccessLog log=None):
        limits = limits or Limits()
        self._sites = SiteTable(sites)
        self._mime = mime or MimeTable()
        self._log = log
        memset(&self.context, 0, sizeof(self.context))
        if log is not None:
            self.context.log = &log.ring
        self.context.sites = self._sites.sites
        self.context.site_count = self._sites.count
        self.context.limits.request_line_bytes_max = limits.request_line_bytes_max
        self.context.limits.header_line_bytes_max = limits.header_line_bytes_max
        self.context.limits.head_bytes_max = limits.head_bytes_max
        self.context.limits.header_count_max = limits.header_count_max
        self.context.limits.requests_per_connection_max = limits.requests_per_connection_max
        self.context.limits.connection_age_ns_max = <uint64_t>limits.connection_age_ms_max * 1_000_000
        self.context.limits.ranges_max = limits.ranges_max
        self.context.limits.body_bytes_max = limits.body_bytes_max
        self.context.boundary = int.from_bytes(os.urandom(8), "little")
        # Each remembered path may hold a descriptor: a quarter of what the process may open, so that clients still get theirs.
        descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        entries_max = max(8, min(limits.entries_max, descriptors // 4))
        if file_table_setup(
            &self.context.table, self._sites.sites, &self._mime.map, <uint32_t>entries_max, limits.content_bytes_max,
            limits.content_file_bytes_max, <uint64_t>limits.entry_unused_ms * 1_000_000
        ) != 0:
            raise MemoryError
        if address_table_setup(
            &self.context.addresses, 0, limits.requests_per_second_per_address
        ) != 0:
            raise MemoryError
        if address_table_setup(
            &self.context.arrivals, limits.connections_per_address_max, limits.connections_per_second_per_address
        ) != 0:
            raise MemoryError

    def __dealloc__(self):
        address_table_teardown(&self.context.arrivals)
        address_table_teardown(&self.context.addresses)
        file_table_teardown(&self.context.table)

    def add_sites(self, sites):
        """Adds sites for connections to come: the number of the first. What is there already stays, with its root_fd.

        For the control thread: the engine reads a site only after it was told its number, through the queue of commands.
        """
        first = self._sites.add(sites)
        self.context.site_count = self._sites.count
        return first

    def counters(self):
        """Counts since the start: responses_1xx … responses_5xx, file_opens, and the gauges file_entries, file_content_bytes."""
        counts = {f"responses_{i}xx": self.context.responses[i] for i in range(1, 6)}
        if self._log is not None:
            counts.update(self._log.counters())
        if self.context.addresses.buckets != NULL:
            counts["addresses"] = self.context.addresses.count
        if self.context.arrivals.buckets != NULL:
            counts["addresses_connected"] = self.context.arrivals.count
        counts["file_opens"] = self.context.table.opens
        counts["file_entries"] = self.context.table.orders[<int>LIST_FILES].count
        counts["file_names_missing"] = self.context.table.orders[<int>LIST_NAMES].count
        counts["file_content_bytes"] = self.context.table.budget.used
        return counts
