"""The system calls of a client ring's program side: mapping, doorbell, and waiting.

Waiting: look for a while, say "asleep", look once more, poll doorbell and attach socket.
"""

from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, MAP_SHARED, PROT_READ, PROT_WRITE, mmap
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
    ssize_t send(int fd, const void* data, size_t length, int flags)
    ssize_t recv(int fd, void* data, size_t length, int flags)
    int shutdown(int fd, int how)
    enum:
        MSG_DONTWAIT
        MSG_NOSIGNAL
        SHUT_RDWR

cdef extern from "sys/mman.h" nogil:
    int madvise(void* address, size_t length, int advice)
    enum:
        MADV_DONTFORK
        MAP_FIXED_NOREPLACE
        MAP_NORESERVE


cdef uint8_t* client_map(int fd, uint64_t size) noexcept nogil:
    cdef void* memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)
    if memory == MAP_FAILED:
        return NULL
    # A child that touched the rings would be a second writer of indices that have one.
    madvise(memory, size, MADV_DONTFORK)
    return <uint8_t*> memory


cdef void client_map_zeros(uint8_t* memory, uint64_t size) noexcept nogil:
    mmap(memory, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0)


cdef void client_ring_doorbell(int fd) noexcept nogil:
    cdef uint8_t ring = 1
    send(fd, &ring, 1, MSG_DONTWAIT | MSG_NOSIGNAL)


cdef int client_empty_doorbell(int fd) noexcept nogil:
    cdef uint8_t[64] bytes
    cdef ssize_t got = recv(fd, bytes, sizeof(bytes), MSG_DONTWAIT)
    if got > 0:
        return 1
    return 0 if got < 0 and (errno == EAGAIN or errno == EINTR) else -1


cdef void client_hang_up(int fd) noexcept nogil:
    shutdown(fd, SHUT_RDWR)


cdef uint64_t monotonic_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef bint client_is_punched(client_header* header) noexcept nogil:
    return (<volatile client_header*> header).magic != CLIENT_MAGIC


cdef int client_sleep(client_header* header, const uint32_t* head, const unsigned char* done, int doorbell_fd, int attach_fd,
                      uint64_t spin_ns, int64_t timeout_ns) noexcept nogil:
    cdef pollfd[2] fds
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
    if fds[0].revents & POLLIN and client_empty_doorbell(doorbell_fd) > 0:
        return 1
    return -2 if (fds[0].revents | fds[1].revents) & (POLLHUP | POLLERR | POLLRDHUP) else 1
