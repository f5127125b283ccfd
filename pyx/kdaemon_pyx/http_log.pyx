"""The access log, in nginx's combined format or as JSON lines."""

import os
import select

from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy, memset

from kdaemon_pyx.atomics cimport load_acquire_u32, store_release_u32
from kdaemon_pyx.http_grammar cimport utf8_length
from kdaemon_pyx.http_request cimport HttpRequest, Slice
from kdaemon_pyx.http_response cimport DateCache, Writer, put, put_decimal, put_text

__all__ = ["AccessLog"]

cdef extern from "<arpa/inet.h>" nogil:
    const char* inet_ntop(int family, const void* address, char* text, unsigned int size)
    const int AF_INET
    const int AF_INET6

cdef extern from "<sys/uio.h>" nogil:
    struct iovec:
        void* iov_base
        size_t iov_len
    ssize_t writev(int fd, const iovec* parts, int count)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd_write(int fd, uint64_t value)

cdef const char* DIGITS = b"0123456789ABCDEF"


cdef inline bint is_plain(uint8_t c) noexcept nogil:
    return c >= 0x20 and c < 0x7f and c != c'"' and c != c'\\'


cdef void put_escaped(Writer* writer, Slice text, uint32_t bytes_max) noexcept nogil:
    # Nothing a client sends can end a field or a line: \xNN for what is not printable ASCII, as nginx does.
    cdef uint32_t i
    cdef uint8_t c
    cdef uint8_t[4] escape
    if text.data == NULL:
        put(writer, b"-", 1)
        return
    for i in range(text.length if text.length < bytes_max else bytes_max):
        c = text.data[i]
        if is_plain(c):
            put(writer, &c, 1)
            continue
        escape[0] = c'\\'
        escape[1] = c'x'
        escape[2] = <uint8_t>DIGITS[c >> 4]
        escape[3] = <uint8_t>DIGITS[c & 15]
        put(writer, escape, 4)


cdef void put_json_text(Writer* writer, Slice text, uint32_t bytes_max) noexcept nogil:
    # UTF-8 as it is; of other bytes their value: \u00NN.
    cdef uint32_t i = 0
    cdef uint32_t n
    cdef uint32_t length = text.length if text.length < bytes_max else bytes_max
    cdef uint8_t c
    cdef uint8_t[6] escape
    memcpy(escape, b"\\u00", 4)
    while i < length:
        c = text.data[i]
        n = 1 if is_plain(c) else 0 if c < 0x80 else utf8_length(text.data + i, length - i)
        if n != 0:
            put(writer, text.data + i, n)
            i += n
            continue
        escape[4] = <uint8_t>DIGITS[c >> 4]
        escape[5] = <uint8_t>DIGITS[c & 15]
        put(writer, escape, 6)
        i += 1


cdef void put_peer(Writer* writer, const PeerAddress* peer) noexcept nogil:
    cdef char[48] text
    if peer.length == 0 or inet_ntop(
        AF_INET if peer.length == 4 else AF_INET6, peer.bytes, text, sizeof(text)
    ) == NULL:
        put(writer, b"-", 1)
    else:
        put_text(writer, text)


cdef uint32_t put_combined(
    Writer* writer, const DateCache* date, const PeerAddress* peer, const HttpRequest* request, int status
) noexcept nogil:
    # 127.0.0.1 - - [06/Nov/1994:08:49:37 +0000] "GET / HTTP/1.1" 200 5 "-" "curl/8". Where the 5 goes.
    cdef uint8_t[20] time
    cdef const uint8_t* start = writer.position
    cdef uint32_t bytes_at
    memcpy(time, date.text + 5, 20)                        # 06 Nov 1994 08:49:37
    time[2] = time[6] = c'/'
    time[11] = c':'
    put_peer(writer, peer)
    put_text(writer, b" - - [")
    put(writer, time, 20)
    put_text(writer, b' +0000] "')
    put_escaped(writer, request.line, REQUEST_BYTES_MAX)
    put_text(writer, b'" ')
    put_decimal(writer, <uint64_t>status)
    put(writer, b" ", 1)
    bytes_at = <uint32_t>(writer.position - start)
    put_text(writer, b' "')
    put_escaped(writer, request.referer, FIELD_BYTES_MAX)
    put_text(writer, b'" "')
    put_escaped(writer, request.user_agent, FIELD_BYTES_MAX)
    put_text(writer, b'"\n')
    return bytes_at


cdef uint32_t put_json(
    Writer* writer, const DateCache* date, const PeerAddress* peer, const HttpRequest* request, int status
) noexcept nogil:
    cdef const uint8_t* start = writer.position
    cdef uint32_t bytes_at
    put_text(writer, b'{"time":')
    put_decimal(writer, <uint64_t>date.now_s)
    put_text(writer, b',"client":"')
    put_peer(writer, peer)
    put_text(writer, b'","host":"')
    put_json_text(writer, request.host, FIELD_BYTES_MAX)
    put_text(writer, b'","request":"')
    put_json_text(writer, request.line, REQUEST_BYTES_MAX)
    put_text(writer, b'","status":')
    put_decimal(writer, <uint64_t>status)
    put_text(writer, b',"bytes":')
    bytes_at = <uint32_t>(writer.position - start)
    put_text(writer, b',"referer":"')
    put_json_text(writer, request.referer, FIELD_BYTES_MAX)
    put_text(writer, b'","user_agent":"')
    put_json_text(writer, request.user_agent, FIELD_BYTES_MAX)
    put_text(writer, b'"}\n')
    return bytes_at


cdef void log_line_format(
    const LogRing* ring, LogLine* line, const DateCache* date, const PeerAddress* peer, const HttpRequest* request,
    int status, uint64_t body_bytes
) noexcept nogil:
    cdef Writer writer
    writer.position = line.text
    writer.end = line.text + LINE_BYTES_MAX
    writer.overflow = False
    line.body_bytes = body_bytes
    if ring.json:
        line.bytes_at = put_json(&writer, date, peer, request, status)
    else:
        line.bytes_at = put_combined(&writer, date, peer, request, status)
    line.length = <uint32_t>(writer.position - line.text)


cdef LogLine* log_line_keep(const LogLine* line) noexcept nogil:
    cdef uint64_t size = sizeof(LogLine) - LINE_BYTES_MAX + line.length
    cdef LogLine* kept = <LogLine*>malloc(size)
    if kept != NULL:
        memcpy(kept, line, size)
    return kept


cdef inline void copy_in(LogRing* ring, uint32_t at, const uint8_t* data, uint32_t length) noexcept nogil:
    cdef uint32_t position = at & (ring.size - 1)
    cdef uint32_t first = ring.size - position
    if first > length:
        first = length
    memcpy(ring.data + position, data, first)
    memcpy(ring.data, data + first, length - first)


cdef void log_line_write(LogRing* ring, const LogLine* line) noexcept nogil:
    cdef uint8_t[20] digits
    cdef Writer writer
    cdef uint32_t length, digit_count
    # Pairs with the release in drain(): what the consumer has written out may be overwritten.
    cdef uint32_t used = ring.head - load_acquire_u32(&ring.tail)
    writer.position = digits
    writer.end = digits + sizeof(digits)
    writer.overflow = False
    put_decimal(&writer, line.body_bytes)
    digit_count = <uint32_t>(writer.position - digits)
    length = line.length + digit_count
    if length > ring.size - used:
        ring.dropped += 1
        return
    copy_in(ring, ring.head, line.text, line.bytes_at)
    copy_in(ring, ring.head + line.bytes_at, digits, digit_count)
    copy_in(ring, ring.head + line.bytes_at + digit_count, line.text + line.bytes_at, line.length - line.bytes_at)
    # Pairs with the acquire in drain(): the line is there before it is counted.
    store_release_u32(&ring.head, ring.head + length)
    ring.lines += 1
    if used < ring.size // 2 and used + length >= ring.size // 2:
        eventfd_write(ring.event_fd, 1)


cdef class AccessLog:
    """The ring between one engine thread and the thread that writes its log.

    format: "combined" or "json". ring_bytes: a power of two; what is produced beyond it before ``drain`` comes is dropped and counted.
    "bytes" of a line is the length of the response's body; where the connection ended before, what had been sent of it.

    Thread-safety: one thread calls wait() and drain(); ``counters`` from any.
    """

    def __cinit__(self, str format="combined", uint32_t ring_bytes=1 << 20):
        if format not in ("combined", "json"):
            raise ValueError(f"access log format {format!r}: combined or json")
        if ring_bytes < 4096 or ring_bytes > 1 << 30 or ring_bytes & (ring_bytes - 1):
            raise ValueError(f"access log ring of {ring_bytes} bytes: a power of two from 4096 is needed")
        memset(&self.ring, 0, sizeof(self.ring))
        self.ring.event_fd = -1
        self.ring.size = ring_bytes
        self.ring.json = format == "json"
        self.ring.data = <uint8_t*>malloc(ring_bytes)
        if self.ring.data == NULL:
            raise MemoryError
        self.ring.event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __dealloc__(self):
        free(self.ring.data)
        if self.ring.event_fd >= 0:
            os.close(self.ring.event_fd)

    def wake(self):
        """Lets wait() return."""
        os.eventfd_write(self.ring.event_fd, 1)

    def wait(self, double timeout_s):
        """Returns when the ring is half full, at wake(), or after ``timeout_s`` seconds."""
        if select.select([self.ring.event_fd], [], [], timeout_s)[0]:
            os.eventfd_read(self.ring.event_fd)

    def drain(self, int fd):
        """Writes what is there to ``fd``, in one system call: the number of bytes. OSError leaves the rest for the next time.

        After a write that ended within a line (a full disk), the next one starts on a line of its own.
        """
        cdef iovec[3] parts
        # Pairs with the release in log_line_write(): all bytes before head are there.
        cdef uint32_t head = load_acquire_u32(&self.ring.head)
        cdef uint32_t available = head - self.ring.tail
        cdef uint32_t position = self.ring.tail & (self.ring.size - 1)
        cdef uint32_t first = self.ring.size - position
        cdef ssize_t written
        cdef int error
        if available == 0:
            return 0
        if first > available:
            first = available
        parts[0].iov_base = <char*>b"\n"
        parts[0].iov_len = 1 if self._cut else 0
        parts[1].iov_base = self.ring.data + position
        parts[1].iov_len = first
        parts[2].iov_base = self.ring.data
        parts[2].iov_len = available - first
        with nogil:
            written = writev(fd, parts, 3)
            while written < 0 and errno == EINTR:
                written = writev(fd, parts, 3)
            error = errno
        if written < 0:
            raise OSError(error, os.strerror(error))
        written -= <ssize_t>parts[0].iov_len
        if written > 0:
            # Pairs with the acquire in log_line_write(): the bytes are read, their place is free.
            store_release_u32(&self.ring.tail, self.ring.tail + <uint32_t>written)
        self._cut = written < <ssize_t>available
        return written

    def counters(self):
        """{"log_lines": …, "log_dropped": …} since the start."""
        return {"log_lines": self.ring.lines, "log_dropped": self.ring.dropped}
