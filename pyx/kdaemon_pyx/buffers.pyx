"""Pool of I/O buffers of one engine thread.

Buffers are handed out last in, first out, so a quiet engine keeps touching the same few pages, and those at the bottom that nobody wanted between
two calls of ``pool_rest`` give their pages back to the kernel: a peak costs memory while it lasts. When the prepared ones are used up a bounded
number more comes from malloc and goes back there; beyond that ``pool_take`` answers NULL and the caller waits or closes.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap

cdef extern from "<sys/mman.h>" nogil:
    const int MADV_DONTNEED
    int madvise(void* address, size_t length, int advice)

cdef enum:
    PAGE = 4096
    REST_AT_ONCE = 64              # the pages of so many are given back in less than a millisecond


cdef int class_setup(BufferClass* k, uint32_t capacity, uint32_t count, uint32_t extra_max) noexcept nogil:
    cdef void* memory
    k.capacity = capacity
    k.count = count
    k.extra_max = extra_max
    k.stride = (capacity + PAGE - 1) // PAGE * PAGE      # no two share a page: each gives its own back
    k.memory_size = <uint64_t>k.stride * count
    k.headers = <Buffer*>calloc(count, sizeof(Buffer))
    if k.headers == NULL:
        return -ENOMEM
    memory = mmap(NULL, k.memory_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if memory == MAP_FAILED:
        free(k.headers)
        k.headers = NULL
        return -ENOMEM
    k.memory = <uint8_t*>memory
    return 0


cdef int pool_setup(BufferPool* pool, uint32_t small_count, uint32_t large_count, uint32_t bulk_count) noexcept nogil:
    """Reserves the prepared buffers of all classes. 0 or -ENOMEM."""
    cdef int result
    memset(pool, 0, sizeof(BufferPool))
    result = class_setup(&pool.classes[BUFFER_SMALL], BUFFER_SMALL_SIZE, small_count, 65536)
    if result == 0:
        result = class_setup(&pool.classes[BUFFER_LARGE], BUFFER_LARGE_SIZE, large_count, 1024)
    if result == 0:
        result = class_setup(&pool.classes[BUFFER_BULK], BUFFER_BULK_SIZE, bulk_count, 32)
    if result < 0:
        pool_teardown(pool)
    return result


cdef void pool_teardown(BufferPool* pool) noexcept nogil:
    cdef int i
    for i in range(BUFFER_CLASSES):
        if pool.classes[i].headers != NULL:
            munmap(pool.classes[i].memory, pool.classes[i].memory_size)
            free(pool.classes[i].headers)
            pool.classes[i].headers = NULL


cdef Buffer* pool_take(BufferPool* pool, uint32_t size_class) noexcept nogil:
    """A buffer of the class, or NULL at the bound."""
    cdef BufferClass* k = &pool.classes[size_class]
    cdef Buffer* buffer = k.free
    if buffer != NULL:
        k.free = buffer.next
        k.warm -= 1
        if k.warm < k.unwanted:
            k.unwanted = k.warm
    elif k.cold != NULL:
        buffer = k.cold
        k.cold = buffer.next
        pool.resident += 1
    elif k.fresh < k.count:
        buffer = &k.headers[k.fresh]
        buffer.data = k.memory + <uint64_t>k.fresh * k.stride
        buffer.capacity = k.capacity
        buffer.size_class = size_class
        k.fresh += 1
        pool.resident += 1
    else:
        if k.extra >= k.extra_max:
            return NULL
        buffer = <Buffer*>malloc(sizeof(Buffer) + k.capacity)
        if buffer == NULL:
            return NULL
        buffer.data = <uint8_t*>buffer + sizeof(Buffer)
        buffer.capacity = k.capacity
        buffer.size_class = size_class
        k.extra += 1
    buffer.next = NULL
    pool.in_use += 1
    return buffer


cdef void pool_give(BufferPool* pool, Buffer* buffer) noexcept nogil:
    """Takes a buffer back; no operation may point into it any more."""
    cdef BufferClass* k = &pool.classes[buffer.size_class]
    pool.in_use -= 1
    if buffer >= k.headers and buffer < k.headers + k.count:
        buffer.next = k.free
        k.free = buffer
        k.warm += 1
    else:
        k.extra -= 1
        free(buffer)


cdef bint pool_rest(BufferPool* pool) noexcept nogil:
    """Gives back the pages of buffers that were free between the last two looks, not too many at once. True: more are left for the next call."""
    cdef uint32_t left = REST_AT_ONCE
    cdef uint32_t count, _i
    cdef bint more = False
    cdef Buffer** link
    cdef Buffer* buffer
    cdef BufferClass* k
    cdef int n
    if pool.classes[BUFFER_SMALL].surplus == 0 and pool.classes[BUFFER_LARGE].surplus == 0 and pool.classes[BUFFER_BULK].surplus == 0:
        for n in range(BUFFER_CLASSES):
            pool.classes[n].surplus = pool.classes[n].unwanted
            pool.classes[n].unwanted = pool.classes[n].warm
    for n in range(BUFFER_CLASSES):
        k = &pool.classes[n]
        if k.surplus > k.unwanted:                 # wanted meanwhile
            k.surplus = k.unwanted
        count = k.surplus if k.surplus < left else left
        if count == 0:
            more |= k.surplus > 0
            continue
        left -= count
        k.surplus -= count
        k.unwanted -= count
        k.warm -= count
        more |= k.surplus > 0
        link = &k.free
        for _i in range(k.warm):
            link = &link[0].next
        while link[0] != NULL:                     # the end of the list, which the top never reached
            buffer = link[0]
            link[0] = buffer.next
            madvise(buffer.data, k.stride, MADV_DONTNEED)
            buffer.next = k.cold
            k.cold = buffer
            pool.resident -= 1
    return more
