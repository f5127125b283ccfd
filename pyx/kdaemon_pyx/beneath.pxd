# openat2(2) beneath a folder: neither "..", nor a symbolic link, nor a rename in between leads out of it.

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memset
from posix.fcntl cimport O_CLOEXEC

cdef extern from "<linux/openat2.h>" nogil:
    struct open_how:
        uint64_t flags
        uint64_t mode
        uint64_t resolve
    const uint64_t RESOLVE_BENEATH
    const uint64_t RESOLVE_NO_MAGICLINKS

cdef extern from "<sys/syscall.h>" nogil:
    const long SYS_openat2

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)


cdef inline int openat_beneath(int root_fd, const uint8_t* path, uint64_t flags) noexcept nogil:
    # One attempt: the descriptor, or a negative errno (EXDEV: it leads out). Slashes at the start mean the root.
    cdef open_how how
    cdef long fd
    while path[0] == c'/':
        path += 1
    memset(&how, 0, sizeof(how))
    how.flags = flags | O_CLOEXEC
    how.resolve = RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS
    fd = syscall(SYS_openat2, root_fd, path if path[0] != 0 else <const uint8_t*>b".", &how, sizeof(how))
    return <int>fd if fd >= 0 else -errno
