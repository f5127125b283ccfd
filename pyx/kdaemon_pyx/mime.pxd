# Media types by the suffix of a file's name; looked up once per opened file, not per request.

from libc.stdint cimport uint8_t, uint32_t

from kdaemon_pyx.http_request cimport Slice

cdef struct MimeSlot:
    Slice suffix                   # lower case, without the dot; data == NULL: free
    Slice type

cdef struct MimeMap:
    MimeSlot* slots
    uint32_t mask                  # number of slots, a power of two, less one
    Slice default_type

cdef Slice mime_type(const MimeMap* map, const uint8_t* path, uint32_t length) noexcept nogil

cdef class MimeTable:
    cdef MimeMap map               # read-only after construction, so that engine threads may share it
    cdef list _texts               # owns the bytes that the slots point into
    cdef Slice _slice(self, bytes text)
