"""The client service in one process: a loop to run it, and a fuzzing client that knows the protocol and breaks it.

The fuzzer writes straight into the shared memory of a client of its own, as a hostile program would, and checks from the daemon's
private counters that every submission has one completion, that a second client's memory stays as it was, and that nothing leaks.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset

from kdaemon_pyx.client_abi cimport (
    CLIENT_ACCEPT, CLIENT_ADOPT, CLIENT_BARRIER, CLIENT_CANCEL, CLIENT_CLOSE, CLIENT_CONNECT, CLIENT_EXPORT, CLIENT_INFO,
    CLIENT_LISTEN, CLIENT_NOP, CLIENT_OPCODE_COUNT, CLIENT_OPEN, CLIENT_READ, CLIENT_SHUTDOWN, CLIENT_START_TLS,
    CLIENT_WRITE, client_completion, client_parameters, client_publish, client_relax, client_submission,
)
from kdaemon_pyx.client_admission cimport Clients
from kdaemon_pyx.client_loopback cimport client_loopback_backend, client_loopback_connections, client_loopback_control
from kdaemon_pyx.client_service cimport (
    client_service_detach_all, client_service_is_empty, client_service_prepare_sleep, client_service_turn, client_service_wake,
)
from kdaemon_pyx.client_types cimport CLIENT_ATTACHED, OPERATION_FREE, Client, ClientService

import os
import threading


cdef extern from "client_fetch.h" nogil:
    bint client_fetch_alters() noexcept

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)
    enum:
        POLLIN

cdef extern from "time.h" nogil:
    struct timespec:
        long tv_sec
        long tv_nsec
    int clock_gettime(int clock, timespec* now)
    enum:
        CLOCK_MONOTONIC

cdef enum:
    HANDLES = 8
    LISTENERS = 4
    DOOMED = 64
    RESULTS = 160


def fetch_alters() -> bool:
    return client_fetch_alters()


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef struct Fuzzer:
    uint64_t state
    uint64_t entries
    uint64_t cut_off
    uint64_t user_data
    uint64_t[HANDLES] handles        # of connections, seen in completions; many of them are stale by now
    uint64_t[LISTENERS] listeners
    uint64_t[LISTENERS] plain
    uint64_t[DOOMED] doomed          # pushed out of the lists above: to be closed, so that the limit does not refuse all else
    uint32_t doomed_count
    uint32_t handle_next
    uint32_t slot_next
    uint32_t completion_head
    uint32_t submission_tail
    uint64_t[RESULTS] results        # by errno
    uint64_t[CLIENT_OPCODE_COUNT] succeeded
    uint8_t* opcodes                 # of the last operation posted in each slot


cdef uint64_t draw(Fuzzer* fuzzer) noexcept nogil:
    # xorshift64*: fast and good enough to choose mutations
    cdef uint64_t state = fuzzer.state
    state ^= state >> <uint64_t> 12
    state ^= state << <uint64_t> 25
    state ^= state >> <uint64_t> 27
    fuzzer.state = state
    return state * <uint64_t> 2685821657736338717


cdef void fill(Fuzzer* fuzzer, Client* client, client_submission* submission) noexcept nogil:
    """A submission that makes sense, then, in every second one, something that does not."""
    cdef uint64_t dice = draw(fuzzer)
    cdef uint8_t[32] menu = [
        CLIENT_READ, CLIENT_READ, CLIENT_READ, CLIENT_READ, CLIENT_WRITE, CLIENT_WRITE, CLIENT_WRITE, CLIENT_WRITE, CLIENT_NOP, CLIENT_NOP,
        CLIENT_BARRIER, CLIENT_BARRIER, CLIENT_CANCEL, CLIENT_NOP, CLIENT_OPEN, CLIENT_OPEN, CLIENT_CONNECT, CLIENT_START_TLS,
        CLIENT_LISTEN, CLIENT_ACCEPT, CLIENT_ACCEPT, CLIENT_SHUTDOWN, CLIENT_CLOSE, CLIENT_CLOSE, CLIENT_INFO, CLIENT_ADOPT, CLIENT_EXPORT,
        CLIENT_WRITE, CLIENT_READ, CLIENT_CLOSE, CLIENT_NOP, CLIENT_CANCEL,
    ]
    cdef client_parameters* parameters
    cdef uint8_t* byte
    cdef uint8_t opcode = menu[dice & 31]
    cdef uint32_t which
    cdef int _
    memset(submission, 0, sizeof(client_submission))
    for _ in range(client.slot_count):
        fuzzer.slot_next = (fuzzer.slot_next + 1) % client.slot_count
        if client.operations[fuzzer.slot_next].state == OPERATION_FREE:
            break
    fuzzer.user_data += 1
    submission.opcode = opcode
    submission.slot = fuzzer.slot_next
    submission.user_data = fuzzer.user_data
    if not (opcode == CLIENT_CANCEL or opcode == CLIENT_OPEN or opcode == CLIENT_CONNECT or opcode == CLIENT_LISTEN
            or opcode == CLIENT_ADOPT or (opcode <= CLIENT_BARRIER and dice & 32)):
        if opcode == CLIENT_ACCEPT or (opcode == CLIENT_CLOSE and dice & 128):
            submission.handle = fuzzer.listeners[(dice >> 8) % LISTENERS]
        elif opcode == CLIENT_START_TLS:
            submission.handle = fuzzer.plain[(dice >> 8) % LISTENERS]
        else:
            submission.handle = fuzzer.handles[(dice >> 8) % HANDLES]
        if submission.handle == 0 and opcode > CLIENT_BARRIER:
            opcode = submission.opcode = CLIENT_LISTEN if opcode == CLIENT_ACCEPT else CLIENT_OPEN
        elif opcode == CLIENT_CLOSE:
            for which in range(HANDLES):
                if fuzzer.handles[which] == submission.handle and dice & 15:
                    fuzzer.handles[which] = 0
    if fuzzer.doomed_count and (dice >> 60) % 2:
        fuzzer.doomed_count -= 1
        opcode = submission.opcode = CLIENT_CLOSE
        submission.handle = fuzzer.doomed[fuzzer.doomed_count]
    if opcode == CLIENT_READ or opcode == CLIENT_WRITE or opcode == CLIENT_INFO or (opcode == CLIENT_OPEN and dice & 64):
        submission.length = <uint32_t> (1 + (dice >> 16) % 20000)
        submission.offset = (dice >> 32) % (client.arena_size - submission.length + 1)
    if opcode == CLIENT_SHUTDOWN:
        submission.argument = (dice >> 16) & 1
    if opcode == CLIENT_CANCEL:
        submission.target_slot = (dice >> 16) % client.slot_count
        submission.target_user_data = fuzzer.user_data - (submission.slot - submission.target_slot) % client.slot_count
    elif opcode == CLIENT_READ or opcode == CLIENT_ACCEPT or opcode == CLIENT_OPEN or (dice >> 40) % 8 == 0:
        submission.timeout_ns = 1 + (dice >> 43) % 200000
    if opcode == CLIENT_OPEN or opcode == CLIENT_CONNECT or opcode == CLIENT_LISTEN or opcode == CLIENT_START_TLS:
        parameters = &client.slots[submission.slot]
        memset(parameters, 0, sizeof(client_parameters))
        parameters.port = <unsigned short> (1 + (dice >> 20) % 1000)
        parameters.host_length = 9
        parameters.alpn_length = 9
        parameters.alpn[0] = 8
        if (dice >> 50) % 8 == 0:
            byte = <uint8_t*> parameters + draw(fuzzer) % sizeof(client_parameters)
            byte[0] = byte[0] ^ <uint8_t> (<uint32_t> 1 << (dice & 7))
    if opcode < CLIENT_OPCODE_COUNT and submission.slot < client.slot_count:
        fuzzer.opcodes[submission.slot] = opcode
    if (dice >> 52) % 8 > 2:
        return
    for _ in range(1 + <int> ((dice >> 61) % 2)):
        dice = draw(fuzzer)
        if dice & 3 == 0:
            (<uint8_t*> submission)[(dice >> 2) % sizeof(client_submission)] = <uint8_t> (dice >> 16)
        elif dice & 3 == 1:
            byte = <uint8_t*> submission + (dice >> 2) % sizeof(client_submission)
            byte[0] = byte[0] ^ <uint8_t> (<uint32_t> 1 << ((dice >> 16) & 7))
        elif dice & 3 == 2:
            (<uint32_t*> submission)[(dice >> 2) % 16] = <uint32_t> (dice >> 16) | <uint32_t> 0xff000000
        else:
            (<uint64_t*> submission)[(dice >> 2) % 8] = draw(fuzzer) >> (dice >> 58)


cdef void remember(Fuzzer* fuzzer, uint64_t* place, uint64_t handle) noexcept nogil:
    if place[0] and fuzzer.doomed_count < DOOMED:
        fuzzer.doomed[fuzzer.doomed_count] = place[0]
        fuzzer.doomed_count += 1
    place[0] = handle


cdef int reap(Fuzzer* fuzzer, Client* client, bint trusted) noexcept nogil:
    cdef uint32_t tail = client.completion_tail
    cdef client_completion* completion
    cdef int64_t result
    cdef uint8_t opcode
    while fuzzer.completion_head != tail:
        completion = &client.completions[fuzzer.completion_head & (client.completion_entries - 1)]
        result = completion.result
        if result >> 32 > 0:
            fuzzer.handle_next += 1
            opcode = fuzzer.opcodes[completion.slot & 63]
            if opcode == CLIENT_LISTEN:
                remember(fuzzer, &fuzzer.listeners[fuzzer.handle_next % LISTENERS], result)
            elif opcode == CLIENT_CONNECT:
                remember(fuzzer, &fuzzer.plain[fuzzer.handle_next % LISTENERS], result)
            else:
                remember(fuzzer, &fuzzer.handles[fuzzer.handle_next % HANDLES], result)
        if result < 0:
            result = -result
            if result < RESULTS:
                fuzzer.results[result] = fuzzer.results[result] + 1
            elif trusted:
                return -1
        else:
            fuzzer.results[0] = fuzzer.results[0] + 1
            if completion.slot < client.slot_count:
                opcode = fuzzer.opcodes[completion.slot]
                fuzzer.succeeded[opcode] = fuzzer.succeeded[opcode] + 1
        if trusted and completion.reserved:
            return -2
        fuzzer.completion_head += 1
    return 0


cdef class Harness:
    cdef readonly Clients clients
    cdef uint64_t spin_ns
    cdef bint stopping
    cdef bint rewriting
    cdef uint64_t rewrites           # counts the rewriter's looks at `victim`
    cdef Client* victim

    def __init__(self, *, clients_max: int = 64, spin_ns: int = 20000) -> None:
        self.clients = Clients(clients_max=clients_max)
        self.clients.service.backend = client_loopback_backend()
        self.spin_ns = spin_ns

    def connections(self) -> int:
        return client_loopback_connections()

    def turn(self) -> int:
        cdef uint32_t done
        with nogil:
            client_service_wake(self.clients.service)
            done = client_service_turn(self.clients.service)
            client_loopback_control(self.clients.service)
        return done

    def stop(self) -> None:
        self.stopping = True
        self.clients.detach(0)

    def run(self) -> None:
        cdef ClientService* service = self.clients.service
        cdef uint64_t idle_since_ns = 0
        cdef pollfd fds
        cdef uint32_t done
        self.stopping = False
        with nogil:
            fds.fd = service.epoll_fd
            fds.events = POLLIN
            client_service_wake(service)
            while not self.stopping:
                done = client_service_turn(service)
                client_loopback_control(service)
                if done:
                    idle_since_ns = 0
                    continue
                if idle_since_ns == 0:
                    idle_since_ns = monotonic_ns()
                if monotonic_ns() - idle_since_ns < self.spin_ns:
                    client_relax()
                    continue
                idle_since_ns = 0
                if client_service_prepare_sleep(service):
                    continue
                poll(&fds, 1, -1)
                client_service_wake(service)
            client_service_turn(service)
            client_service_detach_all(service)
            while not client_service_is_empty(service):
                client_service_turn(service)
                client_loopback_control(service)

    def _rewrite(self, seed: int) -> None:
        """What a hostile second thread does: alters entries, parameters and indices while the daemon reads them."""
        cdef Fuzzer fuzzer
        cdef Client* client
        cdef uint64_t dice
        cdef uint8_t* byte
        cdef int _
        memset(&fuzzer, 0, sizeof(fuzzer))
        fuzzer.state = seed * 2 + 1
        with nogil:
            while self.rewriting:
                self.rewrites += 1
                client = self.victim
                if client == NULL:
                    client_relax()
                    continue
                dice = draw(&fuzzer)
                for _ in range(64):
                    client_relax()
                if dice & 1:
                    byte = <uint8_t*> client.submissions + (dice >> 8) % (client.submission_entries * sizeof(client_submission))
                else:
                    byte = <uint8_t*> client.slots + (dice >> 8) % (client.slot_count * sizeof(client_parameters))
                byte[0] = byte[0] ^ <uint8_t> (dice >> 1)

    def fuzz(self, entries: int, seed: int, *, rewrite: bool = False) -> dict[str, object]:
        cdef Fuzzer fuzzer
        cdef uint64_t wanted = entries
        cdef uint64_t submissions = 0
        cdef uint64_t rejected = 0
        cdef uint32_t i
        cdef Client* client
        cdef ClientService* service = self.clients.service
        cdef int broken = 0
        cdef uint8_t[64] opcodes
        memset(&fuzzer, 0, sizeof(fuzzer))
        fuzzer.state = seed * 2 + 1
        fuzzer.opcodes = opcodes
        bystander = self._attach(16)
        cdef Client* other = service.clients[<uint32_t> (bystander[0] & 0xffffffff)]
        memset(other.arena, 0x5a, other.arena_size)
        self.rewriting = rewrite
        thread = threading.Thread(target=self._rewrite, args=(seed,)) if rewrite else None
        if thread:
            thread.start()
        try:
            while fuzzer.entries < wanted:
                identity, doorbell = self._attach(64)
                client = service.clients[<uint32_t> (identity & 0xffffffff)]
                fuzzer.completion_head = fuzzer.submission_tail = 0
                memset(fuzzer.handles, 0, sizeof(fuzzer.handles))
                memset(fuzzer.listeners, 0, sizeof(fuzzer.listeners))
                memset(fuzzer.plain, 0, sizeof(fuzzer.plain))
                fuzzer.doomed_count = 0
                memset(fuzzer.opcodes, 0, 64)
                self.victim = client
                with nogil:
                    broken = run_rounds(&fuzzer, service, client, wanted, not rewrite, &submissions, &rejected)
                self.victim = NULL
                looks = self.rewrites
                while rewrite and self.rewrites < looks + 2:     # until the rewriter has surely seen that its victim is gone
                    threading.Event().wait(0.001)
                os.close(doorbell)
                if broken < 0:
                    raise AssertionError(f"invariant {-broken} of the client service broke")
                self.clients.detach(identity)
                while service.clients[<uint32_t> (identity & 0xffffffff)] != NULL:
                    self.turn()
                self.clients.events()
                if self.connections():
                    raise AssertionError(f"{self.connections()} connections of a detached client are left")
            for i in range(other.arena_size):
                if other.arena[i] != 0x5a:
                    raise AssertionError("another client's arena was written")
        finally:
            self.rewriting = False
            self.victim = NULL
            if thread:
                thread.join()
            os.close(bystander[1])
            self.clients.detach(bystander[0])
            self.turn()
            self.turn()
            self.clients.events()
        results = {os.strerror(i) if i else "success": fuzzer.results[i] for i in range(RESULTS) if fuzzer.results[i]}
        return {"entries": submissions, "rejected": rejected, "accepted": submissions - rejected, "cut_off": fuzzer.cut_off,
                "results": results, "succeeded": [fuzzer.succeeded[i] for i in range(CLIENT_OPCODE_COUNT)]}

    def _attach(self, int slots):
        identity, memory_fd, doorbell, _ = self.clients.attach(
            submission_entries=slots, completion_entries=slots, slot_count=slots, arena_size=1 << 17, connections_max=100)
        os.close(memory_fd)
        self.turn()
        return identity, doorbell


cdef int run_rounds(Fuzzer* fuzzer, ClientService* service, Client* client, uint64_t wanted, bint trusted,
                    uint64_t* submissions, uint64_t* rejected) noexcept nogil:
    cdef client_submission submission    # private: the rewriter alters what is shared
    cdef uint32_t count
    cdef int _
    cdef uint64_t dice
    cdef uint32_t index = client.index
    cdef uint64_t seen_submissions = 0
    cdef uint64_t seen_rejected = 0
    for _ in range(20000):
        if fuzzer.entries >= wanted:
            break
        dice = draw(fuzzer)
        count = <uint32_t> dice % 48
        for _ in range(<int> count):
            fill(fuzzer, client, &submission)
            client.submissions[fuzzer.submission_tail & (client.submission_entries - 1)] = submission
            fuzzer.submission_tail += 1
        fuzzer.entries += count
        client_publish(&client.header.submission_tail, fuzzer.submission_tail)
        if (dice >> 32) % 8192 == 0:
            # Break an index: the daemon must cut this client off.
            fuzzer.cut_off += 1
            if dice >> 63:
                client_publish(&client.header.submission_tail, <uint32_t> (dice >> 3) | <uint32_t> 0x40000000)
            else:
                client_publish(&client.header.completion_head, <uint32_t> (dice >> 3) | <uint32_t> 0x40000000)
                client_publish(&client.header.submission_tail, fuzzer.submission_tail + 1)
        while True:
            client_service_turn(service)
            client_loopback_control(service)
            if service.clients[index] == NULL or client.state != CLIENT_ATTACHED:
                submissions[0] += seen_submissions
                rejected[0] += seen_rejected
                return 0
            seen_submissions = client.counters.submissions
            seen_rejected = client.counters.rejected
            if client.counters.submissions != client.counters.completions + client.in_flight:
                return -3
            if reap(fuzzer, client, trusted) < 0:
                return -4
            client_publish(&client.header.completion_head, fuzzer.completion_head)
            if client.submission_head == fuzzer.submission_tail:
                break
            if client.in_flight >= client.completion_entries:
                # Every slot hangs (reads without data, cancelled by nobody): end this client.
                submissions[0] += seen_submissions
                rejected[0] += seen_rejected
                return 0
    submissions[0] += seen_submissions
    rejected[0] += seen_rejected
    return 0
