"""The client service in one process: a loop to run it, and a fuzzing client beside an honest one.

The fuzzing client (client_fuzzer) sees only the memory it shares; here the daemon's private counters are checked: every submission has one
completion, no turn goes on for ever, nothing leaks. After each of its batches but a few the honest client echoes secret bytes, and then
all of its memory must be what it wrote or asked for, and none of its bytes may be anywhere in the hostile client's memory.
"""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset
from posix.mman cimport MAP_FAILED, MAP_SHARED, PROT_READ, PROT_WRITE, mmap, munmap

from kdaemon_pyx.client_abi cimport (
    CLIENT_OPCODE_COUNT, CLIENT_OPEN, CLIENT_READ, CLIENT_WRITE, client_observe, client_publish, client_relax,
    client_submission,
)
from kdaemon_pyx.client_admission cimport Clients
from kdaemon_pyx.client_fuzzer cimport (
    FUZZER_RESULTS, Fuzzer, fuzzer_attach, fuzzer_break_index, fuzzer_draw, fuzzer_post, fuzzer_reap, fuzzer_rewrite,
)
from kdaemon_pyx.client_loopback cimport client_loopback_backend, client_loopback_connections, client_loopback_control
from kdaemon_pyx.client_service cimport (
    client_service_detach_all, client_service_is_empty, client_service_prepare_sleep, client_service_publish, client_service_turn,
    client_service_wake,
)
from kdaemon_pyx.client_types cimport CLIENT_ATTACHED, Client, ClientService

import os
import threading


cdef extern from "client_fetch.h" nogil:
    bint client_fetch_alters() noexcept

cdef extern from "string.h" nogil:
    void* memmem(const void* haystack, size_t haystack_length, const void* needle, size_t needle_length)

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
    SLOTS = 64
    ROUNDS = 5000                    # batches of one hostile client, unless it is cut off before
    TURNS_MAX = 100000               # without any progress: that is a hang
    WAITS_MAX = 2000                 # turns with all slots in flight
    HONEST_EVERY = 16                # batches
    HONEST_SIZE = 4096
    SECRET_SIZE = 16

BROKEN = {
    -1: "a completion tail ahead of the ring",
    -2: "a completion that can not be",
    -3: "submissions are not completions plus what is in flight",
    -4: "the service does not get on",
    -5: "another client's operation failed",
    -6: "another client's memory was altered",
    -7: "another client's bytes are in the hostile one's memory",
}


def fetch_alters() -> bool:
    return client_fetch_alters()


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


# A client that keeps to the protocol, over its shared memory alone, and remembers all of it.
cdef struct Honest:
    uint8_t* memory
    uint64_t memory_size
    uint8_t* shadow                  # what the memory must be
    Client* client
    uint64_t connection
    uint32_t tail
    uint8_t[SECRET_SIZE] secret


cdef int64_t honest_run(Honest* honest, ClientService* service, uint8_t opcode, uint64_t offset, uint32_t length) noexcept nogil:
    """One operation from its posting to its end; its result."""
    cdef Client* client = honest.client
    cdef client_submission* submission = &client.submissions[honest.tail & (client.submission_entries - 1)]
    cdef uint8_t* completion
    cdef int64_t result
    cdef int _
    memset(submission, 0, sizeof(client_submission))
    submission.opcode = opcode
    submission.handle = honest.connection
    submission.user_data = honest.tail
    submission.offset = offset
    submission.length = length
    memcpy(honest.shadow + (<uint8_t*> submission - honest.memory), submission, sizeof(client_submission))
    honest.tail += 1
    client_publish(&client.header.submission_tail, honest.tail)
    for _ in range(TURNS_MAX):
        client_service_turn(service)
        client_service_publish(service)
        client_loopback_control(service)
        if client_observe(&client.header.completion_tail) == honest.tail:
            break
    else:
        return -1
    completion = <uint8_t*> &client.completions[(honest.tail - 1) & (client.completion_entries - 1)]
    if (<uint64_t*> completion)[0] != honest.tail - 1:
        return -1
    result = (<int64_t*> completion)[1]
    memcpy(honest.shadow + (completion - honest.memory), completion, sizeof(client.completions[0]))
    if client_fetch_alters():        # this build's daemon altered the entry itself, and the parameters if it took them
        memcpy(honest.shadow + (<uint8_t*> submission - honest.memory), submission, sizeof(client_submission))
        memcpy(honest.shadow + (<uint8_t*> client.slots - honest.memory), client.slots, sizeof(client.slots[0]))
    client_publish(&client.header.completion_head, honest.tail)
    return result


cdef int honest_open(Honest* honest, ClientService* service) noexcept nogil:
    cdef Client* client = honest.client
    client.slots[0].port = 2
    client.slots[0].host_length = 1
    memcpy(honest.shadow, honest.memory, honest.memory_size)
    honest.connection = 0
    honest.connection = <uint64_t> honest_run(honest, service, CLIENT_OPEN, 0, 0)
    return 0 if <int64_t> honest.connection > 0 else -5


cdef int honest_check(Honest* honest, ClientService* service, uint64_t dice) noexcept nogil:
    """Secret bytes go through its connection and come back elsewhere; everything else of its memory is as it was."""
    cdef Client* client = honest.client
    cdef uint8_t* arena = honest.shadow + (client.arena - honest.memory)
    cdef uint32_t length = <uint32_t> (1 + dice % HONEST_SIZE)
    cdef uint64_t there = HONEST_SIZE + (dice >> 16) % (client.arena_size - 2 * HONEST_SIZE)
    cdef uint64_t header = sizeof(uint64_t) * 8
    cdef uint32_t i
    for i in range(length):
        arena[i] = honest.secret[i % SECRET_SIZE] ^ <uint8_t> (i // SECRET_SIZE)
    memcpy(client.arena, arena, length)
    memcpy(arena + there, arena, length)
    if honest_run(honest, service, CLIENT_WRITE, 0, length) != length or honest_run(honest, service, CLIENT_READ, there, length) != length:
        return -5
    if memcmp(honest.memory, honest.shadow, header) != 0:
        return -6
    header = <uint64_t> (<uint8_t*> client.submissions - honest.memory)
    return -6 if memcmp(honest.memory + header, honest.shadow + header, honest.memory_size - header) != 0 else 0


cdef uint32_t bindings_in_use(ClientService* service) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t count = 0
    for i in range(service.bindings_used):
        count += service.bindings[i].used
    return count


cdef class Harness:
    cdef readonly Clients clients
    cdef uint64_t spin_ns
    cdef bint stopping
    cdef bint rewriting
    cdef uint64_t looks              # counts the rewriter's looks at `victim`
    cdef Fuzzer* victim

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
            client_service_publish(self.clients.service)
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
                client_service_publish(service)
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
            client_service_publish(service)
            client_service_detach_all(service)
            while not client_service_is_empty(service):
                client_service_turn(service)
                client_service_publish(service)
                client_loopback_control(service)

    def _rewrite(self, seed: int) -> None:
        """The hostile program's second thread."""
        cdef uint64_t state = seed * 2 + 1
        cdef Fuzzer* fuzzer
        cdef int _
        with nogil:
            while self.rewriting:
                self.looks += 1
                fuzzer = self.victim
                if fuzzer != NULL:
                    fuzzer_rewrite(fuzzer, &state)
                for _ in range(32):
                    client_relax()

    def _pause_rewriter(self) -> None:
        self.victim = NULL
        looks = self.looks
        while self.rewriting and self.looks < looks + 2:     # until it has surely seen that its victim is gone
            threading.Event().wait(0.0001)

    def fuzz(self, entries: int, seed: int, *, rewrite: bool = False) -> dict[str, object]:
        cdef Fuzzer fuzzer
        cdef Honest honest
        cdef uint64_t wanted = entries
        cdef uint64_t rejected = 0
        cdef uint32_t i
        cdef uint32_t index
        cdef void* memory
        cdef size_t memory_size
        cdef ClientService* service = self.clients.service
        cdef int broken = 0
        cdef int clients = 0
        cdef uint64_t cut_off = 0
        memset(&fuzzer, 0, sizeof(fuzzer))
        fuzzer.state = seed * 2 + 1
        fuzzer.timeout_max_ns = 20000
        honest_client = self._attach(16, 1 << 16)
        os.close(honest_client[1])
        memset(&honest, 0, sizeof(honest))
        honest.client = service.clients[<uint32_t> (honest_client[0] & 0xffffffff)]
        honest.memory = honest.client.memory
        honest.memory_size = honest.client.memory_size
        honest.shadow = <uint8_t*> malloc(honest.memory_size)
        if honest.shadow == NULL:
            raise MemoryError
        for i in range(SECRET_SIZE):
            honest.secret[i] = <uint8_t> (fuzzer_draw(&fuzzer) >> 40)
        descriptors = len(os.listdir("/proc/self/fd"))
        self.rewriting = rewrite
        thread = threading.Thread(target=self._rewrite, args=(seed,)) if rewrite else None
        if thread:
            thread.start()
        try:
            with nogil:
                broken = honest_open(&honest, service)
            while broken == 0 and fuzzer.entries < wanted:
                clients += 1
                identity, memory_fd, doorbell, memory_size = self._attach(SLOTS, 2 << 20 if clients % 8 == 0 else 1 << 17)
                index = <uint32_t> (identity & 0xffffffff)
                memory = mmap(NULL, memory_size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0)
                os.close(memory_fd)
                if memory == MAP_FAILED:
                    raise MemoryError
                fuzzer_attach(&fuzzer, <uint8_t*> memory)
                self.victim = &fuzzer
                with nogil:
                    broken = run_rounds(&fuzzer, &honest, service, index, wanted, &rejected, &cut_off)
                    if broken == 0 and memmem(memory, memory_size, honest.secret, SECRET_SIZE) != NULL:
                        broken = -7
                self._pause_rewriter()
                munmap(memory, memory_size)
                os.close(doorbell)
                self.clients.detach(identity)
                for _ in range(10):
                    self.turn()
                self.clients.events()
                if broken == 0:
                    with nogil:
                        broken = honest_check(&honest, service, fuzzer_draw(&fuzzer))
                left = {"connections": self.connections() - 1, "tokens": bindings_in_use(service), "clients": len(self.clients.status()) - 1,
                        "descriptors": len(os.listdir("/proc/self/fd")) - descriptors}
                if any(left.values()):
                    raise AssertionError(f"of a detached client are left: {left}")
            if broken < 0:
                raise AssertionError(f"entry {fuzzer.entries}, seed {seed}: {BROKEN[broken]}")
        finally:
            self.rewriting = False
            self.victim = NULL
            if thread:
                thread.join()
            free(honest.shadow)
            os.close(honest_client[2])
            self.clients.detach(honest_client[0])
            for _ in range(3):
                self.turn()
            self.clients.events()
        if self.connections() or self.clients.status():
            raise AssertionError("connections or clients are left")
        results = {os.strerror(i) if i else "success": fuzzer.results[i] for i in range(FUZZER_RESULTS) if fuzzer.results[i]}
        return {"entries": fuzzer.completed, "accepted": fuzzer.completed - fuzzer.refused, "rejected": rejected, "cut_off": cut_off,
                "clients": clients, "results": results, "succeeded": [fuzzer.succeeded[i] for i in range(CLIENT_OPCODE_COUNT)]}

    def _attach(self, int slots, arena_size: int):
        attached = self.clients.attach(
            submission_entries=slots, completion_entries=slots, slot_count=slots, arena_size=arena_size, connections_max=100)
        self.turn()
        return attached


# 0: this client has ended, or is to end: it was cut off, or everything hangs, or it had its share.
cdef int run_rounds(
    Fuzzer* fuzzer, Honest* honest, ClientService* service, uint32_t index, uint64_t wanted, uint64_t* rejected, uint64_t* cut_off,
) noexcept nogil:
    cdef Client* client = service.clients[index]
    cdef uint64_t before = 0
    cdef uint64_t dice
    cdef uint32_t head
    cdef int round_
    cdef int idle
    cdef int waited = 0
    cdef int error = 0
    for round_ in range(ROUNDS):
        if fuzzer.entries >= wanted:
            break
        dice = fuzzer_draw(fuzzer)
        waited = 0 if fuzzer_post(fuzzer, 1 + <uint32_t> dice % 48) else waited + 1
        if waited > WAITS_MAX:
            return 0                 # everything hangs: what has no deadline and nobody to answer it
        if (dice >> 32) % 8192 == 0:
            fuzzer_break_index(fuzzer)
        idle = 0
        while idle < TURNS_MAX:
            head = client.submission_head
            client_service_turn(service)
            client_service_publish(service)
            client_loopback_control(service)
            if service.clients[index] == NULL or client.state != CLIENT_ATTACHED:
                cut_off[0] += 1
                return 0
            rejected[0] += client.counters.rejected - before
            before = client.counters.rejected
            if client.counters.submissions != client.counters.completions + client.in_flight:
                return -3
            error = fuzzer_reap(fuzzer)
            if error < 0:
                return error
            if <int> (client.submission_head - fuzzer.submission_tail) >= 0:
                break
            idle = idle + 1 if client.submission_head == head else 0
            if idle & 1023 == 1023:      # the rewriter may have taken the published index back
                client_publish(&client.header.submission_tail, fuzzer.submission_tail)
        else:
            if client.in_flight >= client.completion_entries:
                return 0
            return -4
        # The rewriter may have published entries that nobody wrote.
        fuzzer.submission_tail = client.submission_head
        if round_ % HONEST_EVERY == 0:
            error = honest_check(honest, service, dice)
            if error < 0:
                return error
            if service.clients[index] != client or client.state != CLIENT_ATTACHED:
                cut_off[0] += 1      # by an index of the rewriter's
                return 0
    return 0
