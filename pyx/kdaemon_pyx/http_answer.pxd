# From a request to the queued head of its response.

from libc.stdint cimport uint8_t, uint32_t, uint64_t

from kdaemon_pyx.http_session cimport HttpSession

# Answers the complete head in `data`, or keeps it as session.waiting until its body is there. False: there is no room for the
# response's head now; nothing has changed, ask again later.
cdef bint answer_request(HttpSession* session, const uint8_t* data, uint32_t length) noexcept nogil
# Answers the head that waited: its body has ended (status 0), or what came of it is refused. False: no room now.
cdef bint answer_waiting(HttpSession* session, int status) noexcept nogil
# Answers with `status` and closes behind it: `data` does not begin with a request that could be understood. False: no room now.
cdef bint refuse_unread(HttpSession* session, int status, const uint8_t* data, uint64_t length) noexcept nogil
