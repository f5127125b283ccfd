"""The file table: paths to opened files, bounded, revalidated."""

from libc.errno cimport (
    EACCES, EAGAIN, EINTR, EINVAL, ELOOP, EMFILE, ENAMETOOLONG, ENFILE, ENODEV, ENOENT, ENOMEM, ENOTDIR, ENXIO, EPERM, EXDEV,
)
from libc.stdint cimport INT64_MIN, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcmp, memcpy, memset
from posix.fcntl cimport O_DIRECTORY, O_NONBLOCK, O_RDONLY
from posix.stat cimport S_ISDIR, S_ISREG
from posix.unistd cimport close

from kdaemon_pyx.beneath cimport openat_beneath
from kdaemon_pyx.http_request cimport PATH_BYTES_MAX, Slice
from kdaemon_pyx.http_site cimport LINES_MAX, SiteC, matching_lines
from kdaemon_pyx.listing cimport LISTING_HTML, Listing, make_listing
from kdaemon_pyx.mime cimport MimeMap, mime_type
from kdaemon_pyx.representation cimport (
    Representation, RepresentationInput, file_stat, representation_of_bytes, representation_of_file,
    representation_release, same_file,
)

cdef extern from "<sys/stat.h>" nogil:
    int fstat(int fd, file_stat* status)

cdef extern from "<fcntl.h>" nogil:
    const int O_NOCTTY

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void* buffer, size_t length, unsigned int flags)

cdef enum:
    TRUSTED_NS = 1_000_000_000
    TRUSTED_COLD_NS = 10_000_000
    HOT_HITS = 8                   # so many within TRUSTED_COLD_NS: it is not looked at again before TRUSTED_NS
    SWEPT_AT_ONCE = 64             # closing so many takes a few microseconds each
    SWEEP_AGAIN_NS = 20_000_000
    ATTEMPTS = 16


cdef int file_table_setup(
    FileTable* table, const SiteC* sites, const MimeMap* mime, uint32_t entries_max, uint64_t content_bytes_max,
    uint64_t content_file_bytes_max, uint64_t unused_ns
) noexcept nogil:
    cdef uint64_t buckets = 64
    memset(table, 0, sizeof(FileTable))
    while buckets < 4 * <uint64_t>entries_max:
        buckets *= 2
    table.buckets = <Entry**>calloc(buckets, sizeof(Entry*))
    if table.buckets == NULL:
        return -ENOMEM
    table.bucket_mask = buckets - 1
    getrandom(&table.seed, sizeof(table.seed), 0)
    table.orders[<int>LIST_FILES].count_max = entries_max
    table.orders[<int>LIST_NAMES].count_max = entries_max
    table.budget.bytes_max = content_bytes_max
    table.budget.file_bytes_max = content_file_bytes_max
    table.unused_ns = unused_ns
    table.sites = sites
    table.mime = mime
    table.failure.status = 503
    return 0


cdef void file_table_teardown(FileTable* table) noexcept nogil:
    cdef int kind
    if table.buckets == NULL:
        return
    for kind in range(<int>LIST_COUNT):
        while table.orders[kind].oldest != NULL:
            evict(table, table.orders[kind].oldest)
    free(table.buckets)
    table.buckets = NULL


cdef uint64_t hash_path(uint64_t seed, uint32_t site, const uint8_t* path, uint32_t length) noexcept nogil:
    # Eight bytes at a time, multiplied and folded; keyed by the seed.
    cdef uint64_t value = seed ^ (<uint64_t>site << 32) ^ length
    cdef uint64_t word
    while length >= 8:
        memcpy(&word, path, 8)
        value = (value ^ word) * <uint64_t>0x9E3779B97F4A7C15
        value ^= value >> 29
        path += 8
        length -= 8
    word = 0
    memcpy(&word, path, length)
    value = (value ^ word) * <uint64_t>0xBF58476D1CE4E5B9
    value ^= value >> 32
    value *= seed | 1
    return value ^ (value >> 29)


cdef inline void order_remove(EntryOrder* order, Entry* entry) noexcept nogil:
    if entry.newer != NULL:
        entry.newer.older = entry.older
    else:
        order.newest = entry.older
    if entry.older != NULL:
        entry.older.newer = entry.newer
    else:
        order.oldest = entry.newer
    order.count -= 1


cdef inline void order_add(EntryOrder* order, Entry* entry) noexcept nogil:
    entry.newer = NULL
    entry.older = order.newest
    if order.newest != NULL:
        order.newest.newer = entry
    else:
        order.oldest = entry
    order.newest = entry
    order.count += 1


cdef void evict(FileTable* table, Entry* entry) noexcept nogil:
    cdef Entry** link = &table.buckets[entry.hash & table.bucket_mask]
    cdef int i
    while link[0] != entry:
        link = &link[0].next_in_bucket
    link[0] = entry.next_in_bucket
    order_remove(&table.orders[entry.list], entry)
    for i in range(<int>ENCODING_COUNT):
        if entry.representations[i] != NULL:
            representation_release(entry.representations[i])
    free(entry)


cdef uint64_t file_table_sweep(FileTable* table, uint64_t now_ns) noexcept nogil:
    # The least recently used that nobody wants any more let go of their files, so that a deleted file's space returns.
    cdef int kind
    cdef int swept = 0
    cdef Entry* oldest
    for kind in range(<int>LIST_COUNT):
        while swept < SWEPT_AT_ONCE:
            oldest = table.orders[kind].oldest
            if oldest == NULL or now_ns - oldest.used_ns < table.unused_ns:
                break
            evict(table, oldest)
            swept += 1
    return SWEEP_AGAIN_NS if swept == SWEPT_AT_ONCE else table.unused_ns // 4 + SWEEP_AGAIN_NS


cdef bint is_hidden(const uint8_t* path, uint32_t length) noexcept nogil:
    # A segment that begins with a dot, other than "." and "..", which are the kernel's business, and /.well-known (RFC 8615).
    cdef uint32_t i
    for i in range(length - 1):
        if path[i] != c'/' or path[i + 1] != c'.':
            continue
        if i + 2 == length or path[i + 2] == c'/':
            continue
        if path[i + 2] == c'.' and (i + 3 == length or path[i + 3] == c'/'):
            continue
        if i == 0 and length >= 12 and memcmp(path, b"/.well-known", 12) == 0 and (length == 12 or path[12] == c'/'):
            continue
        return True
    return False


cdef int status_of_errno(int error) noexcept nogil:
    if error == ENOENT or error == ENOTDIR or error == ENAMETOOLONG or error == EINVAL:
        return 404
    if error == EACCES or error == EPERM or error == EXDEV or error == ELOOP or error == ENXIO or error == ENODEV:
        return 403                                         # EXDEV: the path or a link in it leads outside the root
    if error == EMFILE or error == ENFILE or error == ENOMEM or error == EAGAIN:
        return 503
    return 500


cdef int open_beneath(FileTable* table, int root_fd, const uint8_t* path, uint64_t flags) noexcept nogil:
    # The descriptor, or a negative errno.
    cdef int _attempt
    cdef int fd = -EAGAIN
    for _attempt in range(ATTEMPTS):
        fd = openat_beneath(root_fd, path, flags | O_NONBLOCK | O_NOCTTY)
        if fd >= 0:
            table.opens += 1
            return fd
        if fd == -EMFILE or fd == -ENFILE:
            if table.orders[<int>LIST_FILES].oldest == NULL:
                break
            evict_other(table)
        elif fd != -EAGAIN and fd != -EINTR:               # EAGAIN: "..", and something was renamed meanwhile
            break
    return fd


cdef void evict_other(FileTable* table) noexcept nogil:
    # The least recently used entry; never the one being resolved, which is not linked, or is the newest, while that happens.
    cdef Entry* oldest = table.orders[<int>LIST_FILES].oldest
    if oldest != NULL and oldest != table.orders[<int>LIST_FILES].newest:
        evict(table, oldest)


cdef Representation* open_representation(
    FileTable* table, const SiteC* site, const uint8_t* path, const RepresentationInput* given,
    Representation* known, int64_t newer_than_s, int* status_code
) noexcept nogil:
    # Opens `path`; gives back `known` (same reference) when that is still the file. NULL: *status_code says why.
    cdef file_stat status
    cdef int fd = open_beneath(table, site.root_fd, path, O_RDONLY)
    cdef Representation* made
    if fd < 0:
        status_code[0] = status_of_errno(-fd)
        return NULL
    if fstat(fd, &status) != 0:
        status_code[0] = 500
        close(fd)
        return NULL
    if S_ISDIR(status.st_mode):
        status_code[0] = 301
        close(fd)
        return NULL
    if not S_ISREG(status.st_mode):
        status_code[0] = 403
        close(fd)
        return NULL
    if status.st_mtim.tv_sec < newer_than_s:
        status_code[0] = 404
        close(fd)
        return NULL
    status_code[0] = 200
    if known != NULL and not known.racy and known.vary == given.vary and same_file(known, &status):
        close(fd)
        return known
    made = representation_of_file(fd, &status, given, &table.budget)
    if made == NULL:
        status_code[0] = 503
    return made


cdef const char* suffix_of(int encoding) noexcept nogil:
    return b".gz" if encoding == ENCODING_GZIP else b".br" if encoding == ENCODING_BROTLI else b".zst"


cdef Slice name_of(int encoding) noexcept nogil:
    # RFC 9110 section 8.4.1, RFC 7932, RFC 8878.
    cdef Slice name
    name.data = <const uint8_t*>(
        b"gzip" if encoding == ENCODING_GZIP else b"br" if encoding == ENCODING_BROTLI else b"zstd")
    name.length = 2 if encoding == ENCODING_BROTLI else 4
    return name


cdef int resolve_file(
    FileTable* table, const SiteC* site, uint8_t* path, uint32_t length, Slice url_path,
    Representation** known, Representation** found
) noexcept nogil:
    # `path` has room for a suffix behind its NUL. Fills `found` by Encoding; gives the status.
    cdef RepresentationInput given
    cdef Slice[LINES_MAX] lines
    cdef int status_code = 404
    cdef int ignored
    cdef int encoding
    memset(&given, 0, sizeof(given))
    given.content_type = mime_type(table.mime, path, length)
    given.lines = lines
    given.line_count = matching_lines(site, url_path.data, url_path.length, lines)
    found[0] = open_representation(table, site, path, &given, known[0], INT64_MIN, &status_code)
    if found[0] == NULL or not site.precompressed:
        return status_code
    given.vary = True
    for encoding in range(1, <int>ENCODING_COUNT):
        memcpy(path + length, suffix_of(encoding), 5 if encoding == ENCODING_ZSTD else 4)
        given.content_encoding = name_of(encoding)
        # A sibling older than the file it was made from is stale, and not used.
        found[encoding] = open_representation(
            table, site, path, &given, known[encoding], found[0].file.mtime_s, &ignored)
    path[length] = 0
    if found[1] != NULL or found[2] != NULL or found[3] != NULL:
        given.content_encoding.length = 0
        if not found[0].vary:
            if found[0] != known[0]:
                representation_release(found[0])
            found[0] = open_representation(table, site, path, &given, NULL, INT64_MIN, &status_code)
    return status_code


cdef int list_directory(
    FileTable* table, const SiteC* site, int fd, Slice url_path, Representation** found
) noexcept nogil:
    cdef RepresentationInput given
    cdef Slice[LINES_MAX] lines
    cdef Listing listing
    cdef int kind
    cdef int error = make_listing(fd, site.root_fd, url_path.data, url_path.length, site.dotfiles, &listing)
    if error < 0:
        return status_of_errno(-error)
    memset(&given, 0, sizeof(given))
    given.generated = True
    given.lines = lines
    given.line_count = matching_lines(site, url_path.data, url_path.length, lines)
    for kind in range(2):
        given.content_type.data = <const uint8_t*>(
            b"text/html; charset=utf-8" if kind == LISTING_HTML else b"application/json")
        given.content_type.length = 24 if kind == LISTING_HTML else 16
        found[kind] = representation_of_bytes(listing.text[kind], listing.length[kind], &given, &table.budget)
    return 200 if found[0] != NULL and found[1] != NULL else 503


cdef int resolve(FileTable* table, Entry* entry, Representation** found) noexcept nogil:
    cdef const SiteC* site = &table.sites[entry.site]
    cdef uint8_t[PATH_BYTES_MAX + 264] path                # NAME_MAX for an index, and a suffix
    cdef Slice url_path
    cdef uint32_t i
    cdef int status_code
    cdef int fd
    url_path.data = entry.path
    url_path.length = entry.path_length
    if not site.dotfiles and is_hidden(entry.path, entry.path_length):
        return 404
    memcpy(path, entry.path, entry.path_length + 1)
    if path[entry.path_length - 1] != c'/':
        return resolve_file(table, site, path, entry.path_length, url_path, entry.representations, found)
    for i in range(site.index_count):
        if site.index[i].length > 255:
            continue
        memcpy(path + entry.path_length, site.index[i].data, site.index[i].length)
        path[entry.path_length + site.index[i].length] = 0
        status_code = resolve_file(
            table, site, path, entry.path_length + site.index[i].length, url_path, entry.representations, found)
        if status_code != 404 and status_code != 301:      # an index that is a directory is no index
            return status_code
    path[entry.path_length] = 0
    fd = open_beneath(table, site.root_fd, path, O_RDONLY | O_DIRECTORY)
    if fd < 0:
        return status_of_errno(-fd)
    if site.listing:
        entry.listing = True
        return list_directory(table, site, fd, url_path, found)
    close(fd)
    return 403


cdef void settle(FileTable* table, Entry* entry, uint64_t now_ns, bint linked) noexcept nogil:
    # Resolves the entry's path and puts it into the order it belongs to.
    cdef Representation* found[4]
    cdef int i
    cdef uint8_t kind
    memset(found, 0, sizeof(found))
    entry.listing = False
    entry.status = <uint16_t>resolve(table, entry, found)
    for i in range(<int>ENCODING_COUNT):
        if entry.status != 200 and found[i] != NULL and found[i] != entry.representations[i]:
            representation_release(found[i])
        if entry.status != 200:
            found[i] = NULL
        if entry.representations[i] != NULL and entry.representations[i] != found[i]:
            representation_release(entry.representations[i])
        entry.representations[i] = found[i]
    entry.encoded = not entry.listing and (found[1] != NULL or found[2] != NULL or found[3] != NULL)
    entry.checked_ns = now_ns
    entry.hits = 0
    kind = <uint8_t>(LIST_FILES if entry.status == 200 else LIST_NAMES)
    if linked:
        order_remove(&table.orders[entry.list], entry)
    entry.list = kind
    order_add(&table.orders[kind], entry)


cdef inline void keep_bound(FileTable* table, Entry* newest) noexcept nogil:
    cdef EntryOrder* order = &table.orders[newest.list]
    if order.count > order.count_max and order.oldest != newest:
        evict(table, order.oldest)


cdef inline bint is_trusted(const Entry* entry, uint64_t now_ns) noexcept nogil:
    cdef uint64_t age_ns = now_ns - entry.checked_ns
    if entry.status == 503:
        return False
    if age_ns < TRUSTED_COLD_NS:
        return True
    if entry.hits < HOT_HITS or (entry.representations[0] != NULL and entry.representations[0].racy):
        return False
    return age_ns < TRUSTED_NS


cdef Entry* file_table_lookup(
    FileTable* table, uint32_t site, const uint8_t* path, uint32_t length, uint64_t now_ns
) noexcept nogil:
    cdef uint64_t hash = hash_path(table.seed, site, path, length)
    cdef Entry** bucket = &table.buckets[hash & table.bucket_mask]
    cdef Entry* entry = bucket[0]
    while entry != NULL:
        if (
            entry.hash == hash and entry.path_length == length and entry.site == site
            and memcmp(entry.path, path, length) == 0
        ):
            break
        entry = entry.next_in_bucket
    if entry != NULL:
        entry.used_ns = now_ns
        if entry != table.orders[entry.list].newest:
            order_remove(&table.orders[entry.list], entry)
            order_add(&table.orders[entry.list], entry)
        entry.hits += 1
        if not is_trusted(entry, now_ns):
            settle(table, entry, now_ns, True)
            keep_bound(table, entry)
        return entry
    entry = <Entry*>calloc(1, sizeof(Entry) + length)
    if entry == NULL:
        return &table.failure
    entry.hash = hash
    entry.site = site
    entry.path_length = length
    memcpy(entry.path, path, length)
    entry.used_ns = now_ns
    settle(table, entry, now_ns, False)
    entry.next_in_bucket = bucket[0]
    bucket[0] = entry
    keep_bound(table, entry)
    return entry


cdef void file_table_distrust(Entry* entry) noexcept nogil:
    entry.checked_ns = 0
