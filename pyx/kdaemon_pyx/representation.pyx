"""Opened files with their response heads, made once and sent many times."""

import os
import re

from libc.errno cimport EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, mmap, munmap
from posix.time cimport clock_gettime, timespec
from posix.types cimport off_t
from posix.unistd cimport close

from kdaemon_pyx.connection cimport File
from kdaemon_pyx.http_conditional cimport MTIME_NONE, Validators
from kdaemon_pyx.http_grammar cimport equals_ignoring_case
from kdaemon_pyx.http_response cimport (
    HTTP_DATE_BYTES, Writer, format_http_date, put, put_decimal, put_hexadecimal, put_slice, put_status_line, put_text,
)

cdef extern from "<sys/stat.h>" nogil:
    int fstat(int fd, file_stat* status)

cdef extern from "<sys/vfs.h>" nogil:
    struct file_system "statfs":
        long f_type
    int fstatfs(int fd, file_system* found)

cdef extern from "<linux/magic.h>" nogil:
    const long EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t preadv2(int fd, const iovec* iov, int count, off_t offset, int flags)
    const int RWF_NOWAIT

cdef extern from "<time.h>" nogil:
    const int CLOCK_REALTIME, CLOCK_REALTIME_COARSE

cdef extern from "<unistd.h>" nogil:
    unsigned geteuid()

cdef enum:
    # Timestamps of files advance in steps of a timer tick (10 ms at worst): within two of them a change can go unseen.
    TIMESTAMP_STEP_NS = 20_000_000
    WHOLE_SECONDS_STEP_NS = 2_000_000_000  # of file systems that store no fractions
    HEAD_WITHOUT_FIELDS_BYTES_MAX = 512


# Since Linux 6.13 some file systems give a change of its own time to whatever changes after its time was asked for.
cdef bint kernel_times_each_change = tuple(map(int, re.findall("[0-9]+", os.uname().release)[:2])) >= (6, 13)


cdef bint times_each_change(int fd) noexcept nogil:
    cdef file_system found
    return kernel_times_each_change and fstatfs(fd, &found) == 0 and (
        found.f_type == EXT4_SUPER_MAGIC or found.f_type == XFS_SUPER_MAGIC
        or found.f_type == <long>BTRFS_SUPER_MAGIC or found.f_type == TMPFS_MAGIC
    )


cdef bint changed_just_now(int fd, const file_stat* status) noexcept nogil:
    # True where a further change could leave the same time behind.
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    cdef int64_t age_ns = (now.tv_sec - status.st_ctim.tv_sec) * 1_000_000_000 + now.tv_nsec - status.st_ctim.tv_nsec
    if status.st_ctim.tv_nsec == 0:
        return age_ns < WHOLE_SECONDS_STEP_NS
    return age_ns < TIMESTAMP_STEP_NS and not times_each_change(fd)


cdef int64_t not_in_the_future(int64_t mtime_s) noexcept nogil:
    # RFC 9110 section 8.8.2.1: Last-Modified is never later than Date, which may be that of a moment ago.
    cdef timespec now
    clock_gettime(CLOCK_REALTIME_COARSE, &now)
    return mtime_s if mtime_s <= now.tv_sec else now.tv_sec - 1


cdef void put_etag(Writer* writer, Representation* representation) noexcept nogil:
    # Size, mtime, ctime and inode: whatever changes the content changes ctime, which nobody can set back.
    cdef File* file = &representation.file
    put(writer, b'"', 1)
    put_hexadecimal(writer, file.size)
    put(writer, b"-", 1)
    put_hexadecimal(writer, <uint64_t>file.mtime_s * 1_000_000_000 + file.mtime_ns)
    put(writer, b"-", 1)
    put_hexadecimal(writer, (<uint64_t>file.ctime_s * 1_000_000_000 + file.ctime_ns) ^ (file.inode << 40))
    put(writer, b'"', 1)


cdef bint names_field(const RepresentationInput* given, const char* name, uint32_t length) noexcept nogil:
    cdef uint32_t i
    for i in range(given.line_count):
        if given.lines[i].length > length and equals_ignoring_case(given.lines[i].data, length, name, length):
            return True
    return False


cdef bint make_head(Representation* representation, const RepresentationInput* given) noexcept nogil:
    cdef Writer writer
    cdef uint8_t[HTTP_DATE_BYTES] date
    cdef uint32_t i
    cdef uint8_t* etag_start
    cdef uint64_t room = HEAD_WITHOUT_FIELDS_BYTES_MAX + given.content_type.length + given.content_encoding.length
    for i in range(given.line_count):
        room += given.lines[i].length
    representation.head = <uint8_t*>malloc(room)
    if representation.head == NULL:
        return False
    writer.position = representation.head
    writer.end = representation.head + room
    writer.overflow = False
    put_status_line(&writer, 200)
    representation.type_start = <uint32_t>(writer.position - representation.head)
    put_text(&writer, b"Content-Type: ")
    put_slice(&writer, given.content_type)
    put(&writer, b"\r\n", 2)
    if given.content_encoding.length != 0:
        put_text(&writer, b"Content-Encoding: ")
        put_slice(&writer, given.content_encoding)
        put(&writer, b"\r\n", 2)
    representation.type_length = <uint32_t>(writer.position - representation.head) - representation.type_start
    put_text(&writer, b"Content-Length: ")
    put_decimal(&writer, representation.file.size)
    put(&writer, b"\r\n", 2)
    representation.common_start = <uint32_t>(writer.position - representation.head)
    put_text(&writer, b"Server: kdaemon\r\nDate: ")
    representation.date_start = <uint32_t>(writer.position - representation.head)
    format_http_date(0, date)                              # overwritten in every response
    put(&writer, date, HTTP_DATE_BYTES)
    if given.generated:
        put_text(&writer, b"\r\nVary: Accept\r\n")
        if not names_field(given, b"cache-control:", 14):
            put_text(&writer, b"Cache-Control: no-cache\r\n")
    else:
        put_text(&writer, b"\r\nLast-Modified: ")
        format_http_date(representation.last_modified_s, date)
        put(&writer, date, HTTP_DATE_BYTES)
        put_text(&writer, b"\r\nETag: ")
        if representation.etag_weak:
            put(&writer, b"W/", 2)
        etag_start = writer.position
        put_etag(&writer, representation)
        representation.etag.data = etag_start
        representation.etag.length = <uint32_t>(writer.position - etag_start)
        put_text(&writer, b"\r\nAccept-Ranges: bytes\r\n")
    if given.vary:
        put_text(&writer, b"Vary: Accept-Encoding\r\n")
    for i in range(given.line_count):
        put_slice(&writer, given.lines[i])
    representation.head_length = <uint32_t>(writer.position - representation.head)
    return not writer.overflow


cdef Representation* representation_of_file(
    int fd, const file_stat* status, const RepresentationInput* given, ContentBudget* budget
) noexcept nogil:
    cdef Representation* representation = <Representation*>calloc(1, sizeof(Representation))
    cdef File* file
    if representation == NULL:
        close(fd)
        return NULL
    file = &representation.file
    file.fd = fd
    file.references = 1
    file.release = release_file
    file.size = <uint64_t>status.st_size
    file.mtime_s = status.st_mtim.tv_sec
    file.mtime_ns = <uint32_t>status.st_mtim.tv_nsec
    file.ctime_s = status.st_ctim.tv_sec
    file.ctime_ns = <uint32_t>status.st_ctim.tv_nsec
    file.links = status.st_nlink
    file.inode = status.st_ino
    file.device = status.st_dev
    representation.budget = budget
    representation.content_type = given.content_type
    representation.vary = given.vary
    representation.last_modified_s = not_in_the_future(file.mtime_s)
    representation.racy = changed_just_now(fd, status)
    representation.etag_weak = representation.racy
    if not make_head(representation, given):
        representation_release(representation)
        return NULL
    return representation


cdef Representation* representation_of_bytes(
    uint8_t* content, uint64_t length, const RepresentationInput* given, ContentBudget* budget
) noexcept nogil:
    cdef Representation* representation = <Representation*>calloc(1, sizeof(Representation))
    if representation == NULL:
        free(content)
        return NULL
    representation.file.fd = -1
    representation.file.references = 1
    representation.file.release = release_file
    representation.file.size = length
    representation.last_modified_s = MTIME_NONE
    representation.budget = budget
    representation.content = content
    budget.used += length
    representation.content_type = given.content_type
    representation.vary = given.vary
    representation.racy = True
    if not make_head(representation, given):
        representation_release(representation)
        return NULL
    return representation


cdef void representation_retain(Representation* representation) noexcept nogil:
    representation.file.references += 1


cdef void representation_release(Representation* representation) noexcept nogil:
    representation.file.references -= 1
    if representation.file.references == 0:
        release_file(&representation.file)


cdef void release_file(File* file) noexcept nogil:
    cdef Representation* representation = <Representation*>file
    if file.mapping != NULL:
        munmap(file.mapping, file.mapping_size)
    if file.fd >= 0:
        close(file.fd)
    if representation.content != NULL:
        representation.budget.used -= file.size
    free(representation.content)
    free(representation.head)
    free(representation)


cdef bint same_file(const Representation* representation, const file_stat* status) noexcept nogil:
    cdef const File* file = &representation.file
    return (
        file.inode == status.st_ino and file.device == status.st_dev and file.size == <uint64_t>status.st_size
        and file.mtime_s == status.st_mtim.tv_sec and file.mtime_ns == <uint32_t>status.st_mtim.tv_nsec
        and file.ctime_s == status.st_ctim.tv_sec and file.ctime_ns == <uint32_t>status.st_ctim.tv_nsec
    )


cdef bint representation_is_current(const Representation* representation) noexcept nogil:
    cdef file_stat status
    return fstat(representation.file.fd, &status) == 0 and same_file(representation, &status)


cdef bint representation_load(Representation* representation) noexcept nogil:
    cdef iovec part
    cdef uint64_t size = representation.file.size
    cdef ContentBudget* budget = representation.budget
    cdef ssize_t n
    if representation.content != NULL:
        return True
    if size == 0 or size > budget.file_bytes_max or budget.used + size > budget.bytes_max:
        return False
    part.iov_base = malloc(size)
    if part.iov_base == NULL:
        return False
    part.iov_len = size
    n = preadv2(representation.file.fd, &part, 1, 0, RWF_NOWAIT)
    if n < 0 and errno == EOPNOTSUPP and representation.read_before:
        # A file system without RWF_NOWAIT (overlayfs, 9p): after one transfer its pages are very likely resident.
        n = preadv2(representation.file.fd, &part, 1, 0, 0)
    # Read and then found unchanged: these bytes are the ones the head's ETag and length were made for.
    if n < 0 or <uint64_t>n != size or not representation_is_current(representation):
        free(part.iov_base)
        return False
    representation.content = <uint8_t*>part.iov_base
    budget.used += size
    return True


cdef bint representation_map(Representation* representation) noexcept nogil:
    # Only the owner of a file, and root, are told what is resident: for everybody else mincore() says "all" (since Linux 5.2).
    cdef File* file = &representation.file
    cdef void* mapping = MAP_FAILED
    cdef file_stat status
    if file.mapping != NULL:
        return True
    if file.mapping_refused or file.size == 0:
        return False
    if fstat(file.fd, &status) == 0 and (status.st_uid == geteuid() or geteuid() == 0):
        mapping = mmap(NULL, file.size, PROT_READ, MAP_SHARED, file.fd, 0)
    if mapping == MAP_FAILED:
        file.mapping_refused = True
        return False
    file.mapping = <uint8_t*>mapping
    file.mapping_size = file.size
    return True


cdef void representation_validators(
    const Representation* representation, int64_t now_s, Validators* validators
) noexcept nogil:
    validators.etag = representation.etag
    validators.etag_weak = representation.etag_weak
    validators.mtime_s = representation.last_modified_s
    validators.now_s = now_s
