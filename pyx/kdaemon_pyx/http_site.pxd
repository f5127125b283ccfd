# Sites as the engine sees them: http_config.Site copied into C, read-only from then on.

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t

from kdaemon_pyx.http_request cimport Slice

cdef enum:
    LINES_MAX = 32                 # header rules of one site
    SITE_BY_HOST = 1 << 30         # http_config.SITE_BY_HOST
    SITES_MAX = 1024               # in the life of a service

cdef struct HeaderRuleC:
    Slice pattern
    Slice line                     # with its CRLF; empty: the field is not sent
    uint32_t field                 # equal numbers: the same field name

cdef struct RedirectRuleC:
    Slice pattern
    Slice to
    uint16_t status

cdef struct ErrorPageC:
    uint16_t status
    Slice path

cdef struct SiteC:
    int root_fd
    bint dotfiles
    bint precompressed
    bint listing
    Slice fallback                 # data == NULL: none
    uint32_t first                 # the sites of one configuration have consecutive numbers
    uint32_t last
    Slice* names                   # lower case
    uint32_t name_count
    Slice* index
    uint32_t index_count
    HeaderRuleC* headers
    uint32_t header_count
    uint32_t header_bytes          # of all rules together
    RedirectRuleC* redirects
    uint32_t redirect_count
    ErrorPageC* error_pages
    uint32_t error_page_count

# One '*' stands for any bytes; `star` gets them.
cdef bint pattern_matches(Slice pattern, const uint8_t* path, uint32_t length, Slice* star) noexcept nogil
# The number of the site, of the configuration that `current` is of, that answers for `host` (RFC 9110 section 7.4): by exact name,
# then by "*.", then the one without names. -1: none. Without a host it is `current`.
cdef int64_t site_of_host(const SiteC* sites, uint32_t current, Slice host) noexcept nogil
cdef const RedirectRuleC* find_redirect(
    const SiteC* site, const uint8_t* path, uint32_t length, Slice* star) noexcept nogil
# The header lines of the rules that match, of each field the last one; LINES_MAX of them at most: their number.
cdef uint32_t matching_lines(const SiteC* site, const uint8_t* path, uint32_t length, Slice* lines) noexcept nogil
# Path of the page for `status`; data == NULL: none.
cdef Slice error_page(const SiteC* site, int status) noexcept nogil

cdef class SiteTable:
    cdef SiteC* sites
    cdef readonly uint32_t count
    cdef list _texts               # owns the bytes the slices point into
    cdef list _arrays              # owns the arrays
    cdef Slice _slice(self, text)
    cdef void* _array(self, size_t bytes_needed) except *
    cdef int _fill(self, SiteC* site, object given) except -1
