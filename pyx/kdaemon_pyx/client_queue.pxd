# The daemon's side of the rings: memory, fetching submissions, posting completions, deadlines. Knows nothing of connections.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.client_abi cimport client_parameters, client_submission
from kdaemon_pyx.client_types cimport Client, ClientQueue, ClientService

# Make the shared memory, the doorbell and all private tables. The caller owns *doorbell_program_fd (to pass and then close).
# Sizes are clamped by the caller. Returns 0 or a negative errno; on error nothing is left behind.
cdef int client_create(
    ClientService* service, uint32_t submission_entries, uint32_t completion_entries, uint32_t slot_count,
    uint64_t arena_size, uint32_t endpoints_max, Client** result, int* doorbell_program_fd,
) noexcept nogil
# Give back everything, the shared pages included: the memory is punched out, whoever still maps it.
cdef void client_free(Client* client) noexcept nogil

# 1: *submission is a private copy; 0: nothing to fetch, or no completion space for it; <0: the client broke the protocol.
cdef int client_next_submission(Client* client, client_submission* submission) noexcept nogil
# Submissions wait and could be fetched.
cdef bint client_has_submissions(Client* client) noexcept nogil
cdef void client_fetch_parameters(Client* client, uint32_t slot, client_parameters* parameters) noexcept nogil
# Post one completion into space reserved by client_next_submission(). Visible after client_publish_completions().
cdef void client_post(Client* client, uint64_t user_data, uint32_t slot, int64_t result, uint32_t detail, bint quiet) noexcept nogil
# What a backend without better means does to ring.
cdef void client_ring(Client* client) noexcept nogil
cdef void client_publish_completions(Client* client) noexcept nogil
cdef void client_drain_doorbell(Client* client) noexcept nogil

# Deadlines: a binary heap of slots, earliest first.
cdef void client_heap_add(Client* client, uint32_t slot) noexcept nogil
cdef void client_heap_remove(Client* client, uint32_t slot) noexcept nogil

# First-in first-out queues of slots.
cdef void client_queue_push(Client* client, ClientQueue* queue, uint32_t slot) noexcept nogil
cdef void client_queue_remove(Client* client, ClientQueue* queue, uint32_t slot) noexcept nogil
