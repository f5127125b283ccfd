"""Listeners of one engine thread."""

from libc.stdint cimport int32_t, int64_t, uint32_t

from kdaemon_pyx.core cimport Core, Listener


cdef enum:
    LISTEN_TLS = -1                # its connections begin with a handshake
    LISTEN_LIMITED = -2            # likewise, and the services are asked first whether they are welcome


cdef int listener_add(Core* core, int32_t number, int32_t fd, int64_t plain) noexcept nogil
cdef void listener_remove(Core* core, int32_t number) noexcept nogil
cdef void listeners_stop(Core* core) noexcept nogil
cdef void listeners_resume(Core* core) noexcept nogil
cdef bint listeners_armed(Core* core) noexcept nogil
cdef bint has_spoken(int32_t fd) noexcept nogil
cdef void listener_accepted(Core* core, Listener* listener, int32_t result, uint32_t flags) noexcept nogil
cdef void connection_adopt(Core* core, int32_t fd, int64_t cookie, bint foreign) noexcept nogil
