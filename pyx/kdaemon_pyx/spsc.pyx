"""Unbounded single-producer single-consumer queue: a linked list of chunks.

The producer fills the tail chunk and publishes each message by a release store of ``count``; the consumer's acquire load of ``count``
is its pair. A full chunk gets its successor by a release store of ``next``, paired with the consumer's acquire load of it; after that load
the producer never touches the old chunk again, so the consumer frees it.
"""

from libc.errno cimport ENOMEM
from libc.stdint cimport uint32_t
from libc.stdlib cimport calloc, free, malloc

from kdaemon_pyx.atomics cimport load_acquire_ptr, load_acquire_u32, store_release_ptr, store_release_u32
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse


cdef int queue_setup(Queue* q) noexcept nogil:
    cdef Chunk* chunk = <Chunk*>calloc(1, sizeof(Chunk))
    if chunk == NULL:
        return -ENOMEM
    q.head = chunk
    q.tail = chunk
    q.taken = 0
    return 0


cdef void queue_teardown(Queue* q) noexcept nogil:
    """Frees what is queued; both sides must have stopped."""
    cdef Message message
    if q.head == NULL:
        return
    while queue_pop(q, &message):
        message_free(&message)
    free(q.head)
    q.head = NULL
    q.tail = NULL


cdef int queue_push(Queue* q, const Message* message) noexcept nogil:
    """Producer. 0, or -ENOMEM (then the message's data still belongs to the caller)."""
    cdef Chunk* chunk = q.tail
    cdef Chunk* fresh
    cdef uint32_t count = chunk.count
    if count == CHUNK_MESSAGES:
        fresh = <Chunk*>malloc(sizeof(Chunk))
        if fresh == NULL:
            return -ENOMEM
        fresh.next = NULL
        fresh.count = 0
        store_release_ptr(<void**>&chunk.next, fresh)   # pair: load_acquire_ptr in queue_pop and queue_empty
        q.tail = fresh
        chunk = fresh
        count = 0
    chunk.messages[count] = message[0]
    store_release_u32(&chunk.count, count + 1)          # pair: load_acquire_u32 in queue_pop and queue_empty
    return 0


cdef bint queue_pop(Queue* q, Message* message) noexcept nogil:
    """Consumer. False if nothing is published."""
    cdef Chunk* chunk = q.head
    cdef Chunk* next_chunk
    if q.taken == load_acquire_u32(&chunk.count):       # pair: store_release_u32 in queue_push
        if q.taken < CHUNK_MESSAGES:
            return False
        next_chunk = <Chunk*>load_acquire_ptr(<void**>&chunk.next)   # pair: store_release_ptr in queue_push
        if next_chunk == NULL or load_acquire_u32(&next_chunk.count) == 0:
            return False
        free(chunk)
        q.head = next_chunk
        q.taken = 0
        chunk = next_chunk
    message[0] = chunk.messages[q.taken]
    q.taken += 1
    return True


cdef bint queue_empty(Queue* q) noexcept nogil:
    """Consumer."""
    cdef Chunk* next_chunk
    if q.taken != load_acquire_u32(&q.head.count):      # pair: store_release_u32 in queue_push
        return False
    if q.taken < CHUNK_MESSAGES:
        return True
    next_chunk = <Chunk*>load_acquire_ptr(<void**>&q.head.next)      # pair: store_release_ptr in queue_push
    return next_chunk == NULL or load_acquire_u32(&next_chunk.count) == 0


cdef void message_free(Message* message) noexcept nogil:
    if message.data != NULL:
        if message.secret:
            OPENSSL_cleanse(message.data, message.length)
        free(message.data)
        message.data = NULL
