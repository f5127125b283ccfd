# Buddy allocator over the data arena of a client ring. All its bookkeeping is private to the program; it never touches the arena.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef enum:
    ARENA_NONE = 0xffffffff
    ARENA_BLOCK_SIZE = 256          # bytes of the smallest block: order 0
    ARENA_ORDERS = 24               # 256 B .. 2 GiB

cdef struct Arena:
    uint32_t block_count
    uint32_t[ARENA_ORDERS] free_heads
    uint32_t* next                  # per block: links of the free list it heads
    uint32_t* previous
    uint8_t* orders                 # per block: order of the free or used block that begins here
    uint8_t* is_free
    uint64_t used                   # bytes

cdef int arena_initialize(Arena* arena, uint64_t size) noexcept nogil
cdef void arena_destroy(Arena* arena) noexcept nogil
# Offset in bytes of a block of at least `length` bytes, or -1 when there is none.
cdef long arena_allocate(Arena* arena, uint64_t length) noexcept nogil
cdef void arena_release(Arena* arena, uint64_t offset) noexcept nogil
