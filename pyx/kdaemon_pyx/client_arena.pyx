"""Buddy allocator for the data arena of a client ring (Knuth, The Art of Computer Programming, section 2.5).

Allocation and release take a time bounded by the number of orders; neighbours coalesce at once, so that an arena in which
everything was released can again give its largest block.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc


cdef inline void push(Arena* arena, uint32_t block, uint32_t order) noexcept nogil:
    cdef uint32_t head = arena.free_heads[order]
    arena.orders[block] = <uint8_t> order
    arena.is_free[block] = 1
    arena.next[block] = head
    arena.previous[block] = ARENA_NONE
    if head != ARENA_NONE:
        arena.previous[head] = block
    arena.free_heads[order] = block


cdef inline void unlink(Arena* arena, uint32_t block) noexcept nogil:
    cdef uint32_t next = arena.next[block]
    cdef uint32_t previous = arena.previous[block]
    arena.is_free[block] = 0
    if previous == ARENA_NONE:
        arena.free_heads[arena.orders[block]] = next
    else:
        arena.next[previous] = next
    if next != ARENA_NONE:
        arena.previous[next] = previous


cdef int arena_initialize(Arena* arena, uint64_t size) noexcept nogil:
    cdef uint32_t block = 0
    cdef uint32_t order
    arena.block_count = <uint32_t> (size // ARENA_BLOCK_SIZE)
    arena.used = 0
    arena.next = <uint32_t*> malloc(arena.block_count * sizeof(uint32_t))
    arena.previous = <uint32_t*> malloc(arena.block_count * sizeof(uint32_t))
    arena.orders = <uint8_t*> calloc(arena.block_count, 1)
    arena.is_free = <uint8_t*> calloc(arena.block_count, 1)
    if arena.next == NULL or arena.previous == NULL or arena.orders == NULL or arena.is_free == NULL:
        arena_destroy(arena)
        return -ENOMEM
    for order in range(ARENA_ORDERS):
        arena.free_heads[order] = ARENA_NONE
    while block < arena.block_count:
        order = ARENA_ORDERS - 1
        while block & ((<uint32_t> 1 << order) - 1) or block + (<uint64_t> 1 << order) > arena.block_count:
            order -= 1
        push(arena, block, order)
        block += <uint32_t> 1 << order
    return 0


cdef void arena_destroy(Arena* arena) noexcept nogil:
    free(arena.next)
    free(arena.previous)
    free(arena.orders)
    free(arena.is_free)
    arena.next = arena.previous = NULL
    arena.orders = arena.is_free = NULL


cdef long arena_allocate(Arena* arena, uint64_t length) noexcept nogil:
    cdef uint32_t wanted = 0
    cdef uint32_t order
    cdef uint32_t block
    while wanted < ARENA_ORDERS and <uint64_t> ARENA_BLOCK_SIZE << wanted < length:
        wanted += 1
    order = wanted
    while order < ARENA_ORDERS and arena.free_heads[order] == ARENA_NONE:
        order += 1
    if order >= ARENA_ORDERS:
        return -1
    block = arena.free_heads[order]
    unlink(arena, block)
    while order > wanted:
        order -= 1
        push(arena, block + (<uint32_t> 1 << order), order)
    arena.orders[block] = <uint8_t> order
    arena.used += <uint64_t> ARENA_BLOCK_SIZE << order
    return <long> block * ARENA_BLOCK_SIZE


cdef void arena_release(Arena* arena, uint64_t offset) noexcept nogil:
    cdef uint32_t block = <uint32_t> (offset // ARENA_BLOCK_SIZE)
    cdef uint32_t order = arena.orders[block]
    cdef uint32_t buddy
    arena.used -= <uint64_t> ARENA_BLOCK_SIZE << order
    while order < ARENA_ORDERS - 1:
        buddy = block ^ (<uint32_t> 1 << order)
        if buddy >= arena.block_count or not arena.is_free[buddy] or arena.orders[buddy] != order:
            break
        unlink(arena, buddy)
        if buddy < block:
            block = buddy
        order += 1
    push(arena, block, order)
