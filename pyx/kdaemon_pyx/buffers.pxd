"""Pool of I/O buffers of one engine thread: three sizes, made at start, bounded; what nobody wants gives its pages back."""

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    BUFFER_SMALL = 0
    BUFFER_LARGE = 1
    BUFFER_BULK = 2
    BUFFER_CLASSES = 3
    BUFFER_SMALL_SIZE = 20480      # one full record and a response head, or a partial record
    BUFFER_LARGE_SIZE = 132096     # eight full records: 8 * (16384 + 22) = 131248
    BUFFER_BULK_SIZE = 262912      # sixteen full records: 16 * (16384 + 22) = 262496
    BUFFER_TAIL = 192              # bytes at the end of each that hold the iovecs of a READV into it


# Owner: whoever took it from the pool; an operation of the kernel may point into it until its completion.
cdef struct Buffer:
    Buffer* next                   # free list
    uint8_t* data
    uint32_t capacity              # bytes at data
    uint32_t size_class

cdef struct BufferClass:
    Buffer* free                   # last in, first out: the warmest first
    Buffer* cold                   # without pages: they were given back
    Buffer* headers
    uint8_t* memory
    uint64_t memory_size
    uint32_t count                 # made at start
    uint32_t fresh                 # of these, never handed out yet: their pages are untouched
    uint32_t warm                  # in `free`
    uint32_t unwanted              # the least of `warm` since the last look: so many at the end of `free` were not wanted
    uint32_t surplus               # of these, found at the last look and still to be given back
    uint32_t capacity
    uint32_t stride                # capacity in whole pages
    uint32_t extra                 # allocated beyond, given back to malloc when returned
    uint32_t extra_max

cdef struct BufferPool:
    BufferClass classes[3]
    uint64_t in_use
    uint64_t resident              # made at start and with pages, in use or not


cdef int pool_setup(BufferPool* pool, uint32_t small_count, uint32_t large_count, uint32_t bulk_count) noexcept nogil
cdef void pool_teardown(BufferPool* pool) noexcept nogil
cdef Buffer* pool_take(BufferPool* pool, uint32_t size_class) noexcept nogil
cdef void pool_give(BufferPool* pool, Buffer* buffer) noexcept nogil
cdef bint pool_rest(BufferPool* pool) noexcept nogil
