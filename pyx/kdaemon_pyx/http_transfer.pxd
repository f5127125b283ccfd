# The body of a response that comes from a representation: as much at a time as there is room for, range by range.

from libc.stdint cimport uint32_t

from kdaemon_pyx.http_session cimport HttpSession
from kdaemon_pyx.representation cimport Representation

# Behind the head of a response: its body, the whole (range_count 0) or the context's ranges. Takes a reference, and the context's line
# for the log.
cdef void begin_transfer(HttpSession* session, Representation* representation, uint32_t range_count) noexcept nogil
# Queues as much of the body as there is room for; session.responding is False when that was all.
cdef void continue_transfer(HttpSession* session) noexcept nogil
# The connection has ended, in the middle of a transfer or not.
cdef void abandon_transfer(HttpSession* session) noexcept nogil
