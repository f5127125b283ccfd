# The file table: what a path means, remembered. One per engine thread; never shared.
#
# Containment is the kernel's: every open is openat2(RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS) from the site's root, so neither "..",
# nor a symbolic link, nor a rename in between leads out of it.
#
# An entry is trusted for 10 ms after it was checked against the file system, and for a second where it is asked for all the time; then
# the path is opened anew and compared. So what changes is seen at once where that costs nothing that counts. Names that do not exist are
# remembered in a list of their own, so that a scan for such names cannot drive out the files.
#
# What blocks: openat2 of a path whose directories are not cached, and with them the engine thread. It happens once per path and 10 ms
# at most, costs 1 to 2 microseconds on cached directories, and a read of one directory block where they are not, which is what nginx
# without thread pools does too. File contents are never waited for here.

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from kdaemon_pyx.http_request cimport Slice
from kdaemon_pyx.http_site cimport SiteC
from kdaemon_pyx.mime cimport MimeMap
from kdaemon_pyx.representation cimport ContentBudget, Representation

ctypedef enum Encoding:
    ENCODING_IDENTITY = 0
    ENCODING_GZIP
    ENCODING_BROTLI
    ENCODING_ZSTD
    ENCODING_COUNT

ctypedef enum EntryList:
    LIST_FILES = 0                 # entries that hold representations
    LIST_NAMES                     # entries that are a status only
    LIST_COUNT

cdef struct Entry:
    Entry* next_in_bucket
    Entry* newer
    Entry* older
    uint64_t hash
    uint64_t checked_ns
    uint64_t used_ns
    uint32_t hits                  # since it was checked
    Representation* representations[4]  # by Encoding, of a listing by ListingFormat; all NULL unless status is 200
    uint32_t site
    uint32_t path_length
    uint16_t status                # 200; 301: a directory without its slash; 403, 404, 500, 503
    uint8_t list
    bint encoded                   # a representation besides identity exists
    bint listing                   # generated from a directory
    uint8_t path[1]                # NUL-terminated

cdef struct EntryOrder:            # least recently used at the oldest end
    Entry* newest
    Entry* oldest
    uint32_t count
    uint32_t count_max

cdef struct FileTable:
    Entry** buckets
    uint64_t bucket_mask
    uint64_t seed                  # so that nobody can choose paths that share a bucket
    EntryOrder orders[2]
    ContentBudget budget
    const SiteC* sites
    const MimeMap* mime
    uint64_t unused_ns             # an entry that was not asked for that long is forgotten
    uint64_t opens                 # for the counters
    Entry failure                  # what a look-up gives when there is no memory: 503

# 0, or -ENOMEM.
cdef int file_table_setup(
    FileTable* table, const SiteC* sites, const MimeMap* mime, uint32_t entries_max, uint64_t content_bytes_max,
    uint64_t content_file_bytes_max, uint64_t unused_ns) noexcept nogil
cdef void file_table_teardown(FileTable* table) noexcept nogil
# Forgets what is unused; gives the nanoseconds after which to call again.
cdef uint64_t file_table_sweep(FileTable* table, uint64_t now_ns) noexcept nogil

# What `path` (decoded, NUL-terminated, beginning with '/') means in a site. Never NULL; valid until the next look-up.
cdef Entry* file_table_lookup(
    FileTable* table, uint32_t site, const uint8_t* path, uint32_t length, uint64_t now_ns) noexcept nogil
# Forgets what it knows about the entry at the next look-up: the file turned out to be different.
cdef void file_table_distrust(Entry* entry) noexcept nogil
