"""Unbounded single-producer single-consumer queue of messages between the control thread and the engine thread."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    CHUNK_MESSAGES = 126           # a chunk is just under 8 KB


# One command or event. Owner of `data`: the consumer, from the moment the message is published.
cdef struct Message:
    uint64_t connection            # handle, or listener number
    int32_t kind
    int32_t a
    int64_t b
    uint8_t* data                  # malloc'd, or NULL
    uint32_t length                # bytes at data
    uint32_t secret                # data holds key material: wipe before free
    uint64_t c

cdef struct Chunk:
    Chunk* next                    # written once by the producer, when this chunk is full
    uint32_t count                 # published messages
    uint32_t padding
    Message messages[126]

cdef struct Queue:
    Chunk* head                    # consumer's
    uint32_t taken                 # consumer's: messages taken from head
    Chunk* tail                    # producer's


cdef int queue_setup(Queue* q) noexcept nogil
cdef void queue_teardown(Queue* q) noexcept nogil
cdef int queue_push(Queue* q, const Message* message) noexcept nogil
cdef bint queue_pop(Queue* q, Message* message) noexcept nogil
cdef bint queue_empty(Queue* q) noexcept nogil
cdef void message_free(Message* message) noexcept nogil
