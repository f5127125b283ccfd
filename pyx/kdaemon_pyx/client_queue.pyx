"""The daemon's side of the client rings: shared memory, single-fetch submissions, completions, deadlines.

Everything a client wrote is read once, through ``client_fetch`` or ``client_observe``, into private memory. Nothing the daemon
wrote into shared memory is read back: its indices are private and the shared ones are copies for the program.
"""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memset
from posix.fcntl cimport fcntl
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap
from posix.unistd cimport close, ftruncate

from kdaemon_pyx.client_abi cimport (
    CLIENT_MAGIC, CLIENT_PAGE, CLIENT_VERSION_MAJOR, client_completion, client_header,
    client_must_ring, client_observe, client_parameters, client_publish, client_submission,
)
from kdaemon_pyx.client_types cimport (
    CLIENT_ATTACHED, CLIENT_NONE, DETACH_BAD_COMPLETION_HEAD, DETACH_BAD_SUBMISSION_TAIL, ENDPOINT_RING, Client, ClientEndpoint,
    ClientOperation, ClientQueue, ClientService,
)

cdef extern from "client_fetch.h" nogil:
    void client_fetch(void* copy, void* shared, size_t size) noexcept

cdef extern from "sys/mman.h" nogil:
    int memfd_create(const char* name, unsigned int flags)
    enum:
        MFD_CLOEXEC
        MFD_ALLOW_SEALING

cdef extern from "fcntl.h" nogil:
    int fallocate(int fd, int mode, long offset, long length)
    enum:
        F_ADD_SEALS
        F_SEAL_SEAL
        F_SEAL_SHRINK
        F_SEAL_GROW
        FALLOC_FL_PUNCH_HOLE
        FALLOC_FL_KEEP_SIZE

cdef extern from "sys/socket.h" nogil:
    int socketpair(int domain, int type, int protocol, int* fds)
    ssize_t send(int fd, const void* data, size_t length, int flags)
    ssize_t recv(int fd, void* data, size_t length, int flags)
    enum:
        AF_UNIX
        SOCK_STREAM
        SOCK_CLOEXEC
        SOCK_NONBLOCK
        MSG_DONTWAIT
        MSG_NOSIGNAL


cdef enum:
    RINGS_PER_DRAIN = 32


cdef uint64_t page_align(uint64_t size) noexcept nogil:
    return (size + CLIENT_PAGE - 1) & ~(<uint64_t> CLIENT_PAGE - 1)


cdef int client_create(
    ClientService* service, uint32_t submission_entries, uint32_t completion_entries, uint32_t slot_count,
    uint64_t arena_size, uint32_t endpoints_max, Client** result, int* doorbell_program_fd,
) noexcept nogil:
    cdef uint64_t submission_offset = CLIENT_PAGE
    cdef uint64_t completion_offset = submission_offset + page_align(submission_entries * sizeof(client_submission))
    cdef uint64_t slot_offset = completion_offset + page_align(completion_entries * sizeof(client_completion))
    cdef uint64_t arena_offset = slot_offset + page_align(slot_count * sizeof(client_parameters))
    cdef uint64_t memory_size = arena_offset + page_align(arena_size)
    cdef int[2] doorbell
    cdef void* mapping
    cdef int error
    cdef uint32_t i
    cdef ClientEndpoint* ring
    cdef Client* client = <Client*> calloc(1, sizeof(Client))
    if client == NULL:
        return -ENOMEM
    client.memory_fd = client.doorbell_fd = -1
    client.service = service
    client.operations = <ClientOperation*> calloc(slot_count, sizeof(ClientOperation))
    client.heap = <uint32_t*> malloc(slot_count * sizeof(uint32_t))
    client.endpoints = <ClientEndpoint*> calloc(endpoints_max + 1, sizeof(ClientEndpoint))
    if client.operations == NULL or client.heap == NULL or client.endpoints == NULL:
        client_free(client)
        return -ENOMEM
    client.memory_fd = memfd_create("kdaemon-client", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if client.memory_fd < 0 or ftruncate(client.memory_fd, memory_size) < 0:
        error = -errno
        client_free(client)
        return error
    # Sealed before anybody else sees it: a client that could shrink it would make the daemon's next access a SIGBUS.
    if fcntl(client.memory_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0:
        error = -errno
        client_free(client)
        return error
    mapping = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, client.memory_fd, 0)
    if mapping == MAP_FAILED:
        error = -errno
        client_free(client)
        return error
    client.memory = <uint8_t*> mapping
    client.memory_size = memory_size
    # A socketpair, not an eventfd: file flags of an end that the program holds do not concern the daemon's end.
    if socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, doorbell) < 0:
        error = -errno
        client_free(client)
        return error
    client.doorbell_fd = doorbell[0]
    doorbell_program_fd[0] = doorbell[1]
    client.header = <client_header*> client.memory
    client.submissions = <client_submission*> (client.memory + submission_offset)
    client.completions = <client_completion*> (client.memory + completion_offset)
    client.slots = <client_parameters*> (client.memory + slot_offset)
    client.arena = client.memory + arena_offset
    client.arena_size = page_align(arena_size)
    client.submission_entries = submission_entries
    client.completion_entries = completion_entries
    client.slot_count = slot_count
    client.endpoints_max = endpoints_max
    client.endpoint_free = client.ready_head = client.filling_head = CLIENT_NONE
    client.state = CLIENT_ATTACHED
    for i in range(slot_count):
        client.operations[i].heap_position = CLIENT_NONE
    ring = &client.endpoints[0]
    ring.client = client
    ring.kind = ENDPOINT_RING
    ring.reads.head = ring.reads.tail = ring.writes.head = ring.writes.tail = CLIENT_NONE
    ring.opening_slot = ring.ready_next = ring.filling_next = ring.read_lent = ring.write_lent = CLIENT_NONE
    ring.held.head = ring.held.tail = ring.write_next = ring.pending_next = ring.pending_tail = CLIENT_NONE
    client.header.magic = CLIENT_MAGIC
    client.header.version_major = CLIENT_VERSION_MAJOR
    client.header.header_size = sizeof(client_header)
    client.header.submission_entries = submission_entries
    client.header.completion_entries = completion_entries
    client.header.slot_count = slot_count
    client.header.slot_size = sizeof(client_parameters)
    client.header.submission_offset = <uint32_t> submission_offset
    client.header.completion_offset = <uint32_t> completion_offset
    client.header.slot_offset = <uint32_t> slot_offset
    client.header.arena_offset = arena_offset
    client.header.arena_size = client.arena_size
    result[0] = client
    return 0


cdef void client_free(Client* client) noexcept nogil:
    if client.memory != NULL:
        munmap(client.memory, client.memory_size)
    if client.memory_fd >= 0:
        fallocate(client.memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, client.memory_size)
        close(client.memory_fd)
    if client.doorbell_fd >= 0:
        close(client.doorbell_fd)
    free(client.operations)
    free(client.heap)
    free(client.endpoints)
    memset(client, 0, sizeof(Client))
    free(client)


cdef int client_next_submission(Client* client, client_submission* submission) noexcept nogil:
    cdef uint32_t tail, waiting, unread
    tail = client_observe(&client.header.submission_tail)
    waiting = tail - client.submission_head
    if waiting == 0:
        return 0
    if waiting > client.submission_entries:
        return -DETACH_BAD_SUBMISSION_TAIL
    # Completion space is reserved here: what is in flight and what the program has not read must leave room for one more.
    unread = client.completion_tail - client_observe(&client.header.completion_head)
    if unread > client.completion_entries:
        return -DETACH_BAD_COMPLETION_HEAD
    if unread + client.in_flight >= client.completion_entries:
        return 0
    client_fetch(submission, &client.submissions[client.submission_head & (client.submission_entries - 1)], sizeof(client_submission))
    client.submission_head += 1
    # Pairs with the program's client_observe(submission_head) before it writes that entry again.
    client_publish(&client.header.submission_head, client.submission_head)
    client.in_flight += 1
    client.counters.submissions += 1
    return 1


cdef bint client_has_submissions(Client* client) noexcept nogil:
    cdef uint32_t unread
    if client_observe(&client.header.submission_tail) == client.submission_head:
        return False
    unread = client.completion_tail - client_observe(&client.header.completion_head)
    # A broken head counts as work: the fetch that follows finds it and cuts the client off.
    return unread > client.completion_entries or unread + client.in_flight < client.completion_entries


cdef void client_fetch_parameters(Client* client, uint32_t slot, client_parameters* parameters) noexcept nogil:
    client_fetch(parameters, &client.slots[slot], sizeof(client_parameters))


cdef void client_post(Client* client, uint64_t user_data, uint32_t slot, int64_t result, uint32_t detail, bint quiet) noexcept nogil:
    cdef client_completion* completion = &client.completions[client.completion_tail & (client.completion_entries - 1)]
    completion.user_data = user_data
    completion.result = result
    completion.slot = slot
    completion.detail = detail
    completion.reserved = 0
    client.completion_tail += 1
    if not quiet or result < 0:
        client.ring_wanted = True
    client.in_flight -= 1
    client.counters.completions += 1


cdef void client_ring(Client* client) noexcept nogil:
    cdef uint8_t ring = 1
    # A full socket means that a ring is on its way already; a closed one is seen by the hang-up.
    send(client.doorbell_fd, &ring, 1, MSG_DONTWAIT | MSG_NOSIGNAL)


cdef void client_publish_completions(Client* client) noexcept nogil:
    if client.completion_published == client.completion_tail:
        return
    client.completion_published = client.completion_tail
    # Pairs with the program's client_observe(completion_tail): the entries are visible before the index.
    client_publish(&client.header.completion_tail, client.completion_tail)
    if not client.ring_wanted:
        return
    client.ring_wanted = False
    if client_must_ring(&client.header.program_state):
        client.service.backend.ring(client)
        client.counters.doorbells_sent += 1


cdef void client_drain_doorbell(Client* client) noexcept nogil:
    cdef uint8_t[256] bytes
    cdef int _
    client.counters.doorbells_received += 1
    # Every byte is an event of its own (EPOLLET), so they are taken out only now and then, long before the socket is full. A program
    # that sends more than one byte per ring fills its own socket and is woken less.
    if client.counters.doorbells_received % RINGS_PER_DRAIN == 0:
        for _ in range(16):
            if recv(client.doorbell_fd, bytes, sizeof(bytes), MSG_DONTWAIT) < <ssize_t> sizeof(bytes):
                break


cdef inline void heap_place(Client* client, uint32_t position, uint32_t slot) noexcept nogil:
    client.heap[position] = slot
    client.operations[slot].heap_position = position


cdef void heap_up(Client* client, uint32_t position, uint32_t slot) noexcept nogil:
    cdef uint64_t deadline_ns = client.operations[slot].deadline_ns
    cdef uint32_t parent
    while position > 0:
        parent = (position - 1) >> 1
        if client.operations[client.heap[parent]].deadline_ns <= deadline_ns:
            break
        heap_place(client, position, client.heap[parent])
        position = parent
    heap_place(client, position, slot)


cdef void heap_down(Client* client, uint32_t position, uint32_t slot) noexcept nogil:
    cdef uint64_t deadline_ns = client.operations[slot].deadline_ns
    cdef uint32_t child
    while True:
        child = 2 * position + 1
        if child >= client.heap_length:
            break
        if (child + 1 < client.heap_length and client.operations[client.heap[child + 1]].deadline_ns
                < client.operations[client.heap[child]].deadline_ns):
            child += 1
        if client.operations[client.heap[child]].deadline_ns >= deadline_ns:
            break
        heap_place(client, position, client.heap[child])
        position = child
    heap_place(client, position, slot)


cdef void client_heap_add(Client* client, uint32_t slot) noexcept nogil:
    client.heap_length += 1
    heap_up(client, client.heap_length - 1, slot)


cdef void client_heap_remove(Client* client, uint32_t slot) noexcept nogil:
    cdef uint32_t position = client.operations[slot].heap_position
    cdef uint32_t last
    if position == CLIENT_NONE:
        return
    client.operations[slot].heap_position = CLIENT_NONE
    client.heap_length -= 1
    last = client.heap[client.heap_length]
    if last == slot:
        return
    if position > 0 and client.operations[client.heap[(position - 1) >> 1]].deadline_ns > client.operations[last].deadline_ns:
        heap_up(client, position, last)
    else:
        heap_down(client, position, last)


cdef void client_queue_push(Client* client, ClientQueue* queue, uint32_t slot) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    operation.next = CLIENT_NONE
    operation.previous = queue.tail
    if queue.tail == CLIENT_NONE:
        queue.head = slot
    else:
        client.operations[queue.tail].next = slot
    queue.tail = slot


cdef void client_queue_remove(Client* client, ClientQueue* queue, uint32_t slot) noexcept nogil:
    cdef ClientOperation* operation = &client.operations[slot]
    if operation.previous == CLIENT_NONE:
        queue.head = operation.next
    else:
        client.operations[operation.previous].next = operation.next
    if operation.next == CLIENT_NONE:
        queue.tail = operation.previous
    else:
        client.operations[operation.next].previous = operation.previous
    operation.next = operation.previous = CLIENT_NONE
