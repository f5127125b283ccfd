"""Sites copied into C, and the questions the engine asks of them."""

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcmp, memset

from kdaemon_pyx.http_grammar cimport equals_ignoring_case
from kdaemon_pyx.http_request cimport Slice


cdef bint pattern_matches(Slice pattern, const uint8_t* path, uint32_t length, Slice* star) noexcept nogil:
    cdef uint32_t head = 0
    cdef uint32_t tail
    while head < pattern.length and pattern.data[head] != c'*':
        head += 1
    star.data = path + length
    star.length = 0
    if head == pattern.length:
        return length == head and memcmp(pattern.data, path, head) == 0
    tail = pattern.length - head - 1
    if length < head + tail:
        return False
    if memcmp(pattern.data, path, head) != 0 or memcmp(pattern.data + head + 1, path + length - tail, tail) != 0:
        return False
    star.data = path + head
    star.length = length - head - tail
    return True


cdef bint has_name(const SiteC* site, Slice host, bint wildcard) noexcept nogil:
    # `wildcard`: host begins with the dot that stands behind the '*'.
    cdef uint32_t i
    cdef uint32_t skipped = 1 if wildcard else 0
    for i in range(site.name_count):
        if (site.names[i].data[0] == c'*') == wildcard and equals_ignoring_case(
            host.data, host.length, <const char*>site.names[i].data + skipped, site.names[i].length - skipped
        ):
            return True
    return False


cdef int64_t site_of_host(const SiteC* sites, uint32_t current, Slice host) noexcept nogil:
    cdef const SiteC* own = &sites[current]
    cdef uint32_t i
    cdef Slice parent
    if host.length == 0 or (own.first == own.last and own.name_count == 0):
        return current
    if host.data[host.length - 1] == c'.':
        host.length -= 1
    if has_name(own, host, False):
        return current
    for i in range(own.first, own.last + 1):
        if has_name(&sites[i], host, False):
            return i
    parent = host
    while parent.length != 0 and parent.data[0] != c'.':
        parent.data += 1
        parent.length -= 1
    if parent.length != 0 and parent.length != host.length:
        for i in range(own.first, own.last + 1):
            if has_name(&sites[i], parent, True):
                return i
    for i in range(own.first, own.last + 1):
        if sites[i].name_count == 0:
            return i
    return -1


cdef const RedirectRuleC* find_redirect(
    const SiteC* site, const uint8_t* path, uint32_t length, Slice* star
) noexcept nogil:
    cdef uint32_t i
    for i in range(site.redirect_count):
        if pattern_matches(site.redirects[i].pattern, path, length, star):
            return &site.redirects[i]
    return NULL


cdef uint32_t matching_lines(const SiteC* site, const uint8_t* path, uint32_t length, Slice* lines) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t at
    cdef uint32_t count = 0
    cdef uint32_t[LINES_MAX] field_of_line
    cdef Slice star
    for i in range(site.header_count):
        if pattern_matches(site.headers[i].pattern, path, length, &star):
            at = 0
            while at < count and field_of_line[at] != site.headers[i].field:
                at += 1
            field_of_line[at] = site.headers[i].field
            lines[at] = site.headers[i].line
            if at == count:
                count += 1
    return count


cdef Slice error_page(const SiteC* site, int status) noexcept nogil:
    cdef uint32_t i
    cdef Slice none
    for i in range(site.error_page_count):
        if site.error_pages[i].status == status:
            return site.error_pages[i].path
    none.data = NULL
    none.length = 0
    return none


cdef class SiteTable:
    """The C form of ``http_config.Site`` objects. Sites are added and never change or go, so that a thread that was told a site's number
    may read the site without a lock.
    """

    def __cinit__(self, sites):
        self._texts = []
        self._arrays = []
        self.sites = <SiteC*>self._array(SITES_MAX * sizeof(SiteC))
        self.add(sites)

    def add(self, sites):
        """The number of the first of ``sites``; the others follow. Raises ValueError when there are none, or too many."""
        cdef uint32_t first = self.count
        sites = list(sites)
        if not sites:
            raise ValueError("a file service needs one site at least")
        if first + len(sites) > SITES_MAX:
            raise ValueError(f"more than {SITES_MAX} sites, reloads included: restart the daemon")
        for i, given in enumerate(sites):
            self._fill(&self.sites[first + i], given)
            self.sites[first + i].first = first
            self.sites[first + i].last = first + <uint32_t>len(sites) - 1
        self.count = first + <uint32_t>len(sites)
        return first

    cdef Slice _slice(self, text):
        cdef Slice slice
        cdef bytes encoded = text.encode("utf-8", "surrogateescape")
        self._texts.append(encoded)
        slice.data = encoded
        slice.length = <uint32_t>len(encoded)
        return slice

    cdef void* _array(self, size_t bytes_needed) except *:
        owner = bytearray(bytes_needed + 1)
        cdef char* start = owner
        self._arrays.append(owner)
        memset(start, 0, bytes_needed)
        return start

    cdef int _fill(self, SiteC* site, object given) except -1:
        site.root_fd = given.root_fd
        site.dotfiles = given.dotfiles
        site.precompressed = given.precompressed
        site.listing = given.listing
        if given.fallback is not None:
            site.fallback = self._slice(given.fallback)
        site.name_count = <uint32_t>len(given.names)
        site.names = <Slice*>self._array(site.name_count * sizeof(Slice))
        for i, name in enumerate(given.names):
            site.names[i] = self._slice(name.lower().rstrip("."))
        site.index_count = <uint32_t>len(given.index)
        site.index = <Slice*>self._array(site.index_count * sizeof(Slice))
        for i, name in enumerate(given.index):
            site.index[i] = self._slice(name)
        rules = [(rule.path, name, value) for rule in given.headers for name, value in rule.headers]
        names = [name.lower() for _, name, _ in rules]
        assert len(rules) <= LINES_MAX                     # http_config.Site said so
        site.header_count = <uint32_t>len(rules)
        site.headers = <HeaderRuleC*>self._array(site.header_count * sizeof(HeaderRuleC))
        for i, (path, name, value) in enumerate(rules):
            site.headers[i].pattern = self._slice(path)
            site.headers[i].line = self._slice(f"{name}: {value}\r\n" if value else "")
            site.headers[i].field = <uint32_t>names.index(name.lower())
            site.header_bytes += site.headers[i].line.length
        site.redirect_count = <uint32_t>len(given.redirects)
        site.redirects = <RedirectRuleC*>self._array(site.redirect_count * sizeof(RedirectRuleC))
        for i, rule in enumerate(given.redirects):
            site.redirects[i].pattern = self._slice(rule.path)
            site.redirects[i].to = self._slice(rule.to)
            site.redirects[i].status = rule.status
        site.error_page_count = <uint32_t>len(given.error_pages)
        site.error_pages = <ErrorPageC*>self._array(site.error_page_count * sizeof(ErrorPageC))
        for i, (status, path) in enumerate(sorted(given.error_pages.items())):
            site.error_pages[i].status = status
            site.error_pages[i].path = self._slice(path)
        return 0
