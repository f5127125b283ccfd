"""A hostile program: it knows the client ring's protocol and breaks it. It touches nothing but the memory it shares with the daemon."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.client_abi cimport CLIENT_OPCODE_COUNT, client_completion, client_header, client_parameters, client_submission

cdef enum:
    FUZZER_SLOTS = 1024
    FUZZER_HANDLES = 8
    FUZZER_ENDPOINTS = 256
    FUZZER_RESULTS = 160

cdef struct Fuzzer:
    # The shared memory, as its header described it before anybody could alter that.
    uint8_t* memory
    client_header* header
    client_submission* submissions
    client_completion* completions
    client_parameters* slots
    uint8_t* arena
    uint64_t arena_size
    uint32_t submission_entries
    uint32_t completion_entries
    uint32_t slot_count
    # How this program behaves.
    uint32_t port                    # where CONNECT and OPEN lead; 0: a random one
    uint64_t timeout_max_ns
    # What it knows of its operations.
    uint32_t submission_tail
    uint32_t completion_head
    uint32_t slot_next
    uint8_t[FUZZER_SLOTS] opcodes    # of the operation in each slot; FUZZER_FREE: none
    uint64_t[FUZZER_SLOTS] names     # its user_data
    uint64_t[FUZZER_SLOTS] since     # and how many entries had been written when it was posted
    uint64_t[FUZZER_HANDLES] handles     # of connections, seen in completions; many of them are stale by now
    uint64_t[FUZZER_HANDLES] listeners
    uint64_t[FUZZER_HANDLES] plain
    uint64_t[FUZZER_ENDPOINTS] by_index  # the last handle seen of each index, to close them when the limit of connections is reached
    uint32_t purge                   # so many CLOSEs come next
    uint32_t handle_next
    # Counted over all attachments.
    uint64_t state                   # of the random numbers
    uint64_t user_data
    uint64_t entries
    uint64_t completed
    uint64_t refused                 # EINVAL, EBUSY, EBADF, EMFILE: what the daemon says to what it does not run
    uint64_t[FUZZER_RESULTS] results     # by errno
    uint64_t[CLIENT_OPCODE_COUNT] succeeded

cdef enum:
    FUZZER_FREE = 255

cdef uint64_t fuzzer_draw(Fuzzer* fuzzer) noexcept nogil
# Begin with a new attachment; nobody but the daemon has written to this memory yet.
cdef void fuzzer_attach(Fuzzer* fuzzer, uint8_t* memory) noexcept nogil
# Write up to so many entries, each mutated, and publish them; fewer when many are in flight. How many.
cdef uint32_t fuzzer_post(Fuzzer* fuzzer, uint32_t count) noexcept nogil
# Take what is complete. <0: the daemon wrote what it never may.
cdef int fuzzer_reap(Fuzzer* fuzzer) noexcept nogil
# Publish an index that cannot be.
cdef void fuzzer_break_index(Fuzzer* fuzzer) noexcept nogil
# What a second thread does at the same time: alter an entry the daemon is about to take, a parameter, data, an index or a flag.
# `fuzzer` is only read; the random numbers are the thread's own.
cdef void fuzzer_rewrite(const Fuzzer* fuzzer, uint64_t* state) noexcept nogil
