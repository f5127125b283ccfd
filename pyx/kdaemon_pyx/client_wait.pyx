"""How a program's thread waits for completions: looks for a while, says "asleep", looks once more, polls doorbell and attach socket."""

from libc.errno cimport EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec

from kdaemon_pyx.client_abi cimport CLIENT_MAGIC, client_header, client_observe, client_relax, client_say_asleep, client_say_awake

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd* fds, unsigned long count, int timeout_ms)
    enum:
        POLLIN
        POLLHUP
        POLLERR
        POLLRDHUP

cdef extern from "sys/socket.h" nogil:
    ssize_t recv(int fd, void* data, size_t length, int flags)
    enum:
        MSG_DONTWAIT


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef bint client_is_punched(client_header* header) noexcept nogil:
    return (<volatile client_header*> header).magic != CLIENT_MAGIC


cdef int client_sleep(client_header* header, const uint32_t* head, const unsigned char* done, int doorbell_fd, int attach_fd,
                      uint64_t spin_ns, int64_t timeout_ns) noexcept nogil:
    cdef pollfd[2] fds
    cdef uint8_t[64] bytes
    cdef uint64_t until = 0
    cdef int got, _
    if client_is_punched(header):
        return -2
    if spin_ns:
        until = monotonic_ns() + (spin_ns if timeout_ns < 0 or <uint64_t> timeout_ns > spin_ns else timeout_ns)
        while True:
            for _ in range(64):
                if client_observe(&header.completion_tail) != head[0] or done[0]:
                    return 1
                client_relax()
            if monotonic_ns() >= until:
                break
    client_say_asleep(&header.program_state)
    # Pairs with the daemon's client_must_ring() after it published completion_tail. Another thread may have reaped meanwhile.
    if client_observe(&header.completion_tail) != head[0] or done[0]:
        client_say_awake(&header.program_state)
        return 1
    fds[0].fd = doorbell_fd
    fds[0].events = POLLIN
    fds[0].revents = fds[1].revents = 0
    fds[1].fd = attach_fd
    fds[1].events = POLLRDHUP
    got = poll(fds, 2, -1 if timeout_ns < 0 else <int> min((timeout_ns + 999999) // 1000000, 0x7fffffff))
    client_say_awake(&header.program_state)
    if got < 0:
        return -1 if errno == EINTR else -2
    if got == 0:
        return 0
    if fds[0].revents & POLLIN:
        if recv(doorbell_fd, bytes, sizeof(bytes), MSG_DONTWAIT) > 0:
            return 1
    return -2 if (fds[0].revents | fds[1].revents) & (POLLHUP | POLLERR | POLLRDHUP) else 1
