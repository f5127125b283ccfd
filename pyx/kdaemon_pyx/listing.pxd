# Listings of directories, as HTML for people and as JSON (nginx's autoindex format) for programs.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kdaemon_pyx.http_request cimport Slice

ctypedef enum ListingFormat:
    LISTING_HTML = 0
    LISTING_JSON

cdef enum:
    # Reading a directory blocks the engine thread, about a microsecond per name when it is cached: it is off by default, done once a
    # second per directory at most, and bounded by this. What does not fit is said in the HTML, and left out.
    LISTING_NAMES_MAX = 5000

cdef struct Listing:
    uint8_t* text[2]               # by ListingFormat; made by malloc, the caller's; NULL both when there is no memory
    uint64_t length[2]

# Reads the directory `fd` (closed in every case) that `path` (decoded, ending with '/', of less than PATH_BYTES_MAX) names beneath
# `root_fd`. A link is what it leads to; one that leads nowhere, or out of the root, is left out. 0, or a negative errno.
cdef int make_listing(
    int fd, int root_fd, const uint8_t* path, uint32_t length, bint dotfiles, Listing* listing) noexcept nogil
# What the client prefers (RFC 9110 section 12.5.1), as far as this needs to know it: JSON where it is named and HTML is not preferred.
cdef ListingFormat preferred_format(Slice accept) noexcept nogil
