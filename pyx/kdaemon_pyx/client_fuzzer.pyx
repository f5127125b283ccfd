"""A hostile program: well-formed submissions, each mutated in one or two of its fields, and a rewriter for a second thread.

Every entry is altered: a field gets another value that could be right (another slot, handle, length ...), one at the edge of what is
allowed, or any. The weights are such that well over 30 % of the entries are run, for what is refused at once tests the least.
"""

from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from kdaemon_pyx.client_abi cimport (
    CLIENT_ACCEPT, CLIENT_ADOPT, CLIENT_ASLEEP, CLIENT_BARRIER, CLIENT_CANCEL, CLIENT_CLOSE, CLIENT_CONNECT, CLIENT_EXPORT, CLIENT_INFO,
    CLIENT_LISTEN, CLIENT_NOP, CLIENT_OPCODE_COUNT, CLIENT_OPEN, CLIENT_PARAMETER_INSECURE, CLIENT_PARAMETER_PLAIN, CLIENT_PARAMETER_SERVER, CLIENT_READ, CLIENT_SHUTDOWN, CLIENT_START_TLS,
    CLIENT_WRITE, client_completion, client_header, client_observe, client_parameters, client_publish, client_submission,
)

cdef extern from "errno.h" nogil:
    enum:
        EBADF
        EBUSY
        EINVAL
        EMFILE

cdef enum:
    LENGTH_MAX = 20000
    CANCEL_AFTER = 200               # entries
    FORGET_AFTER = 2000

# What is mutated.
cdef enum:
    FIELD_OPCODE = 0
    FIELD_FLAGS
    FIELD_ARGUMENT
    FIELD_SLOT
    FIELD_HANDLE
    FIELD_USER_DATA
    FIELD_TIMEOUT
    FIELD_OFFSET
    FIELD_LENGTH
    FIELD_TARGET_SLOT
    FIELD_TARGET_USER_DATA
    FIELD_RESERVED
    FIELD_ANY_BIT


cdef uint64_t advance(uint64_t* state) noexcept nogil:
    # xorshift64*: fast and good enough to choose mutations
    cdef uint64_t value = state[0]
    value ^= value >> <uint64_t> 12
    value ^= value << <uint64_t> 25
    value ^= value >> <uint64_t> 27
    state[0] = value
    return value * <uint64_t> 2685821657736338717


cdef uint64_t fuzzer_draw(Fuzzer* fuzzer) noexcept nogil:
    return advance(&fuzzer.state)


cdef void fuzzer_attach(Fuzzer* fuzzer, uint8_t* memory) noexcept nogil:
    cdef client_header* header = <client_header*> memory
    fuzzer.memory = memory
    fuzzer.header = header
    fuzzer.submissions = <client_submission*> (memory + header.submission_offset)
    fuzzer.completions = <client_completion*> (memory + header.completion_offset)
    fuzzer.slots = <client_parameters*> (memory + header.slot_offset)
    fuzzer.arena = memory + header.arena_offset
    fuzzer.arena_size = header.arena_size
    fuzzer.submission_entries = header.submission_entries
    fuzzer.completion_entries = header.completion_entries
    fuzzer.slot_count = header.slot_count if header.slot_count < FUZZER_SLOTS else FUZZER_SLOTS
    fuzzer.submission_tail = fuzzer.completion_head = fuzzer.purge = 0
    memset(fuzzer.opcodes, FUZZER_FREE, FUZZER_SLOTS)
    memset(fuzzer.handles, 0, sizeof(fuzzer.handles))
    memset(fuzzer.listeners, 0, sizeof(fuzzer.listeners))
    memset(fuzzer.plain, 0, sizeof(fuzzer.plain))
    memset(fuzzer.by_index, 0, sizeof(fuzzer.by_index))


# What was posted long ago may have been sent to another slot by the rewriter: EBUSY will tell if it was not.
cdef inline bint is_free(Fuzzer* fuzzer, uint32_t slot) noexcept nogil:
    return fuzzer.opcodes[slot] == FUZZER_FREE or fuzzer.entries - fuzzer.since[slot] > FORGET_AFTER


cdef inline void occupy(Fuzzer* fuzzer, uint32_t slot, uint8_t opcode, uint64_t name) noexcept nogil:
    fuzzer.opcodes[slot] = opcode
    fuzzer.names[slot] = name
    fuzzer.since[slot] = fuzzer.entries


cdef uint32_t free_slot(Fuzzer* fuzzer) noexcept nogil:
    cdef int _
    for _ in range(64):
        fuzzer.slot_next += 1
        if fuzzer.slot_next >= fuzzer.slot_count:
            fuzzer.slot_next = 0
        if is_free(fuzzer, fuzzer.slot_next):
            break
    return fuzzer.slot_next


cdef inline bint has_buffer(uint8_t opcode) noexcept nogil:
    return (opcode == CLIENT_READ or opcode == CLIENT_WRITE or opcode == CLIENT_INFO or opcode == CLIENT_OPEN
            or opcode == CLIENT_START_TLS)


cdef uint64_t some_handle(Fuzzer* fuzzer, uint8_t opcode, uint64_t dice) noexcept nogil:
    if opcode == CLIENT_ACCEPT or (opcode == CLIENT_CLOSE and dice & 1):
        return fuzzer.listeners[(dice >> 8) % FUZZER_HANDLES]
    if opcode == CLIENT_START_TLS or (opcode >= CLIENT_READ and dice & 0x70 == 0):
        return fuzzer.plain[(dice >> 8) % FUZZER_HANDLES]
    return fuzzer.handles[(dice >> 8) % FUZZER_HANDLES]


# A submission that makes sense.
cdef void well_formed(Fuzzer* fuzzer, client_submission* submission) noexcept nogil:
    cdef uint64_t dice = fuzzer_draw(fuzzer)
    cdef uint8_t[32] menu = [
        CLIENT_READ, CLIENT_READ, CLIENT_READ, CLIENT_READ, CLIENT_WRITE, CLIENT_WRITE, CLIENT_WRITE, CLIENT_WRITE, CLIENT_NOP, CLIENT_NOP,
        CLIENT_BARRIER, CLIENT_BARRIER, CLIENT_CANCEL, CLIENT_NOP, CLIENT_NOP, CLIENT_OPEN, CLIENT_CONNECT, CLIENT_START_TLS,
        CLIENT_LISTEN, CLIENT_ACCEPT, CLIENT_ACCEPT, CLIENT_SHUTDOWN, CLIENT_CLOSE, CLIENT_CLOSE, CLIENT_INFO, CLIENT_ADOPT, CLIENT_EXPORT,
        CLIENT_WRITE, CLIENT_READ, CLIENT_READ, CLIENT_NOP, CLIENT_CANCEL,
    ]
    cdef uint8_t opcode = menu[dice & 31]
    cdef uint32_t i
    memset(submission, 0, sizeof(client_submission))
    if not (opcode == CLIENT_CANCEL or opcode == CLIENT_OPEN or opcode == CLIENT_CONNECT or opcode == CLIENT_LISTEN
            or opcode == CLIENT_ADOPT or (opcode <= CLIENT_BARRIER and dice & 32)):
        submission.handle = some_handle(fuzzer, opcode, dice >> 8)
        if submission.handle == 0 and opcode > CLIENT_BARRIER:
            opcode = CLIENT_LISTEN if opcode == CLIENT_ACCEPT else (CLIENT_CONNECT if opcode == CLIENT_START_TLS else CLIENT_OPEN)
        elif opcode == CLIENT_CLOSE:
            for i in range(FUZZER_HANDLES):
                if fuzzer.handles[i] == submission.handle and dice & 15:
                    fuzzer.handles[i] = 0
    if fuzzer.purge:
        fuzzer.purge -= 1
        opcode = CLIENT_CLOSE
        submission.handle = fuzzer.by_index[fuzzer.purge % FUZZER_ENDPOINTS]
    i = <uint32_t> (dice >> 16) % fuzzer.slot_count
    if fuzzer.opcodes[i] != FUZZER_FREE and fuzzer.entries - fuzzer.since[i] > CANCEL_AFTER:
        opcode = CLIENT_CANCEL       # it hangs: nothing would get on with all slots taken so
        submission.handle = 0
    fuzzer.user_data += 1
    submission.opcode = opcode
    submission.slot = free_slot(fuzzer)
    submission.user_data = fuzzer.user_data
    if has_buffer(opcode) and (opcode != CLIENT_OPEN or dice & 64) and (opcode != CLIENT_START_TLS or dice & 64):
        submission.length = <uint32_t> (1 + (dice >> 16) % LENGTH_MAX)
        submission.offset = (dice >> 32) % (fuzzer.arena_size - submission.length + 1)
    if opcode == CLIENT_SHUTDOWN:
        submission.argument = (dice >> 16) & 1
    if opcode == CLIENT_CANCEL:
        submission.target_slot = (dice >> 16) % fuzzer.slot_count
        submission.target_user_data = fuzzer.names[submission.target_slot]
    elif (dice >> 40) % 64:      # almost all that can hang has a deadline: slots come back
        submission.timeout_ns = 1 + (dice >> 43) % fuzzer.timeout_max_ns


# One number out of those at the edges of what is allowed, or any.
cdef uint64_t wild(Fuzzer* fuzzer, uint64_t limit) noexcept nogil:
    cdef uint64_t dice = fuzzer_draw(fuzzer)
    cdef uint64_t[12] edges = [
        0, 1, limit - 1, limit, limit + 1, <uint64_t> 1 << 31, <uint64_t> 0xffffffff, <uint64_t> 1 << 32, <uint64_t> 1 << 61, <uint64_t> 1 << 62,
        <uint64_t> 1 << 63, <uint64_t> -1,
    ]
    return edges[dice % 16] if dice % 16 < 12 else dice >> (dice >> 58)


cdef inline uint64_t below(uint64_t dice, uint64_t limit) noexcept nogil:
    return dice % limit if limit else dice


cdef void mutate(Fuzzer* fuzzer, client_submission* submission) noexcept nogil:
    cdef uint64_t dice = fuzzer_draw(fuzzer)
    cdef uint8_t[64] fields = [
        FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA,
        FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_USER_DATA,
        FIELD_TIMEOUT, FIELD_TIMEOUT, FIELD_TIMEOUT, FIELD_TIMEOUT, FIELD_TIMEOUT, FIELD_TIMEOUT, FIELD_TIMEOUT, FIELD_TIMEOUT,
        FIELD_TIMEOUT, FIELD_TIMEOUT, FIELD_OFFSET, FIELD_OFFSET, FIELD_OFFSET, FIELD_OFFSET, FIELD_OFFSET, FIELD_OFFSET,
        FIELD_OFFSET, FIELD_OFFSET, FIELD_LENGTH, FIELD_LENGTH, FIELD_LENGTH, FIELD_LENGTH, FIELD_LENGTH, FIELD_LENGTH,
        FIELD_LENGTH, FIELD_LENGTH, FIELD_HANDLE, FIELD_HANDLE, FIELD_HANDLE, FIELD_HANDLE, FIELD_HANDLE, FIELD_SLOT,
        FIELD_SLOT, FIELD_SLOT, FIELD_SLOT, FIELD_OPCODE, FIELD_OPCODE, FIELD_TARGET_SLOT, FIELD_TARGET_USER_DATA, FIELD_FLAGS,
        FIELD_ARGUMENT, FIELD_RESERVED, FIELD_ANY_BIT, FIELD_ANY_BIT, FIELD_ANY_BIT, FIELD_USER_DATA, FIELD_USER_DATA, FIELD_TIMEOUT,
    ]
    cdef uint8_t field = fields[dice & 63]
    cdef bint is_wild = (dice >> 6) & 7 == 0
    cdef uint8_t* byte
    dice >>= <uint64_t> 9
    if (field == FIELD_OFFSET or field == FIELD_LENGTH) and submission.length == 0 and not is_wild:
        field = FIELD_USER_DATA
    if field == FIELD_TIMEOUT and submission.opcode == CLIENT_CANCEL and not is_wild:
        field = FIELD_TARGET_USER_DATA
    if field == FIELD_OPCODE:
        submission.opcode = <uint8_t> (dice if is_wild else dice % CLIENT_OPCODE_COUNT)
    elif field == FIELD_FLAGS:
        submission.flags = <uint8_t> dice | 2
    elif field == FIELD_ARGUMENT:
        submission.argument = <unsigned short> (dice % 4 if dice & 1024 else dice)
    elif field == FIELD_SLOT:
        submission.slot = <uint32_t> wild(fuzzer, fuzzer.slot_count) if is_wild else free_slot(fuzzer)
        if dice % 8 == 0 and not is_wild:
            submission.slot = <uint32_t> (dice >> 3) % fuzzer.slot_count
    elif field == FIELD_HANDLE:
        submission.handle = wild(fuzzer, (<uint64_t> 1 << 32) + 100) if is_wild else some_handle(fuzzer, submission.opcode, dice)
    elif field == FIELD_USER_DATA:
        submission.user_data = wild(fuzzer, fuzzer.user_data) if is_wild else dice << <uint64_t> 40 | fuzzer.user_data
    elif field == FIELD_TIMEOUT:
        submission.timeout_ns = wild(fuzzer, fuzzer.timeout_max_ns) if is_wild else 1 + dice % fuzzer.timeout_max_ns
    elif field == FIELD_OFFSET:
        submission.offset = wild(fuzzer, fuzzer.arena_size) if is_wild else below(dice, fuzzer.arena_size - submission.length + 1)
    elif field == FIELD_LENGTH:
        submission.length = <uint32_t> (wild(fuzzer, fuzzer.arena_size - submission.offset) if is_wild
                                        else 1 + below(dice, fuzzer.arena_size - submission.offset))
    elif field == FIELD_TARGET_SLOT:
        submission.target_slot = <uint32_t> (wild(fuzzer, fuzzer.slot_count) if is_wild else dice % fuzzer.slot_count)
    elif field == FIELD_TARGET_USER_DATA:
        submission.target_user_data = wild(fuzzer, fuzzer.user_data) if is_wild else fuzzer.names[dice % fuzzer.slot_count]
    elif field == FIELD_RESERVED:
        submission.reserved = dice | 1
    else:
        byte = <uint8_t*> submission + dice % sizeof(client_submission)
        byte[0] = byte[0] ^ <uint8_t> (<uint32_t> 1 << ((dice >> 16) & 7))


cdef void fill_parameters(Fuzzer* fuzzer, client_parameters* parameters, uint8_t opcode) noexcept nogil:
    cdef uint64_t dice = fuzzer_draw(fuzzer)
    cdef uint8_t* byte
    memset(parameters, 0, sizeof(client_parameters))
    parameters.port = <unsigned short> (fuzzer.port if fuzzer.port else 2 + (dice % 1000 & ~<uint64_t> (dice >> 20 & 7 > 0)))
    if opcode == CLIENT_LISTEN and fuzzer.port:
        parameters.port = 0
    parameters.flags = CLIENT_PARAMETER_INSECURE if opcode != CLIENT_LISTEN else 0
    parameters.host_length = 9
    memcpy(parameters.host, b"127.0.0.1", 9)
    parameters.alpn_length = 9
    parameters.alpn[0] = 8
    if opcode == CLIENT_START_TLS and dice >> 63:
        parameters.flags = CLIENT_PARAMETER_SERVER
    elif opcode == CLIENT_LISTEN and dice >> 63:
        parameters.flags = CLIENT_PARAMETER_PLAIN
        parameters.alpn_length = 0
    if (dice >> 12) % 4:
        return
    dice >>= <uint64_t> 14
    if dice & 7 == 0:
        parameters.host_length = <unsigned short> (dice >> 3) % 514
    elif dice & 7 == 1:
        parameters.server_name_length = <unsigned short> (dice >> 3) % 514
    elif dice & 7 == 2:
        parameters.alpn_length = <unsigned short> (dice >> 3) % 514
    elif dice & 7 == 3:
        parameters.certificate_length = <unsigned short> (dice >> 3) % 258
    elif dice & 7 == 4:
        parameters.alpn[0] = <uint8_t> (dice >> 3)
    elif dice & 7 == 5:
        parameters.port = <unsigned short> (dice >> 3) & <unsigned short> (dice >> 19)
        parameters.flags = <uint32_t> (dice >> 35) % 16
        parameters.host_length = 9 * (<unsigned short> (dice >> 37) & 1)
    else:
        byte = <uint8_t*> parameters + (dice >> 3) % sizeof(client_parameters)
        byte[0] = byte[0] ^ <uint8_t> (<uint32_t> 1 << (dice >> 20 & 7))


cdef uint32_t fuzzer_post(Fuzzer* fuzzer, uint32_t count) noexcept nogil:
    cdef client_submission submission    # private: the rewriter alters what is shared
    cdef uint32_t in_flight = fuzzer.submission_tail - fuzzer.completion_head
    cdef uint8_t opcode
    cdef int _
    if in_flight + count > fuzzer.slot_count and fuzzer_draw(fuzzer) & 63:     # else more than there is room to answer
        count = fuzzer.slot_count - in_flight if in_flight < fuzzer.slot_count else 0
    for _ in range(<int> count):
        well_formed(fuzzer, &submission)
        opcode = submission.opcode
        mutate(fuzzer, &submission)
        if fuzzer_draw(fuzzer) & 3 == 0:
            mutate(fuzzer, &submission)
        if submission.slot < fuzzer.slot_count:
            if opcode == CLIENT_OPEN or opcode == CLIENT_CONNECT or opcode == CLIENT_LISTEN or opcode == CLIENT_START_TLS:
                fill_parameters(fuzzer, &fuzzer.slots[submission.slot], opcode)
            if is_free(fuzzer, submission.slot) and submission.opcode < CLIENT_OPCODE_COUNT:
                occupy(fuzzer, submission.slot, submission.opcode, submission.user_data)
        fuzzer.submissions[fuzzer.submission_tail & (fuzzer.submission_entries - 1)] = submission
        fuzzer.submission_tail += 1
    fuzzer.entries += count
    client_publish(&fuzzer.header.submission_tail, fuzzer.submission_tail)
    return count


cdef int fuzzer_reap(Fuzzer* fuzzer) noexcept nogil:
    cdef uint32_t tail = client_observe(&fuzzer.header.completion_tail)
    cdef client_completion completion
    cdef uint8_t opcode
    cdef uint32_t where
    cdef int error
    if tail - fuzzer.completion_head > fuzzer.completion_entries:
        return -1
    while fuzzer.completion_head != tail:
        completion = fuzzer.completions[fuzzer.completion_head & (fuzzer.completion_entries - 1)]
        fuzzer.completion_head += 1
        fuzzer.completed += 1
        opcode = FUZZER_FREE
        error = 0
        if completion.reserved or completion.result <= -FUZZER_RESULTS:
            return -2
        if completion.result < 0:
            error = <int> -completion.result
        fuzzer.results[error] = fuzzer.results[error] + 1
        if error == EINVAL or error == EBUSY or error == EBADF or error == EMFILE:
            fuzzer.refused += 1
        if completion.slot < fuzzer.slot_count:
            opcode = fuzzer.opcodes[completion.slot]
            # EBUSY may be the answer to another submission that named the same slot: that one has not ended.
            if error != EBUSY or fuzzer.names[completion.slot] == completion.user_data:
                fuzzer.opcodes[completion.slot] = FUZZER_FREE
            elif is_free(fuzzer, completion.slot):
                occupy(fuzzer, completion.slot, CLIENT_NOP, fuzzer.names[completion.slot])
        if error == EMFILE and fuzzer.purge == 0:
            fuzzer.purge = FUZZER_ENDPOINTS
        if error == 0 and opcode < CLIENT_OPCODE_COUNT:
            fuzzer.succeeded[opcode] = fuzzer.succeeded[opcode] + 1
        if completion.result >> 32 > 0:
            fuzzer.handle_next += 1
            where = fuzzer.handle_next % FUZZER_HANDLES
            fuzzer.by_index[<uint32_t> completion.result % FUZZER_ENDPOINTS] = completion.result
            if opcode == CLIENT_LISTEN:
                fuzzer.listeners[where] = completion.result
            elif opcode == CLIENT_CONNECT or opcode == CLIENT_ADOPT:
                fuzzer.plain[where] = completion.result
            else:
                fuzzer.handles[where] = completion.result
    client_publish(&fuzzer.header.completion_head, fuzzer.completion_head)
    return 0


cdef void fuzzer_break_index(Fuzzer* fuzzer) noexcept nogil:
    cdef uint64_t dice = fuzzer_draw(fuzzer)
    if dice >> 63:
        client_publish(&fuzzer.header.submission_tail, <uint32_t> (dice >> 3) | <uint32_t> 0x40000000)
    else:
        client_publish(&fuzzer.header.completion_head, fuzzer.completion_head + 1 + <uint32_t> dice % 0x7ffffff0)
        client_publish(&fuzzer.header.submission_tail, fuzzer.submission_tail + 1)


cdef void fuzzer_rewrite(const Fuzzer* fuzzer, uint64_t* state) noexcept nogil:
    cdef uint64_t dice = advance(state)
    cdef uint32_t index
    cdef uint8_t* byte
    if dice & 15 < 9:
        index = client_observe(&fuzzer.header.submission_head) + <uint32_t> (dice >> 4) % 4
        byte = <uint8_t*> &fuzzer.submissions[index & (fuzzer.submission_entries - 1)] + (dice >> 8) % sizeof(client_submission)
    elif dice & 15 < 13:
        byte = <uint8_t*> fuzzer.slots + (dice >> 8) % (fuzzer.slot_count * sizeof(client_parameters))
    elif dice & 15 < 15 or (dice >> 4) & 63:
        byte = fuzzer.arena + (dice >> 8) % fuzzer.arena_size
    elif (dice >> 10) & 3 == 0:
        client_publish(&fuzzer.header.submission_tail, client_observe(&fuzzer.header.submission_tail) + <uint32_t> (dice >> 12) % 3 - 1)
        return
    elif (dice >> 10) & 3 == 1:
        client_publish(&fuzzer.header.completion_head, client_observe(&fuzzer.header.completion_head) - <uint32_t> (dice >> 12) % 2)
        return
    else:
        client_publish(&fuzzer.header.daemon_state, <uint32_t> (dice >> 12) & CLIENT_ASLEEP)
        client_publish(&fuzzer.header.program_state, <uint32_t> (dice >> 13) & CLIENT_ASLEEP)
        return
    byte[0] = byte[0] ^ <uint8_t> (dice >> 40)
