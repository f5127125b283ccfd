# From a request to the queued head of its response, and the rest of a response's body as room comes.

from libc.stdint cimport uint8_t, uint32_t

from kdaemon_pyx.http_session cimport HttpSession

# Answers the complete head in `data`. False: there is no room for the response's head now; nothing has changed, ask again later.
cdef bint answer_request(HttpSession* session, const uint8_t* data, uint32_t length) noexcept nogil
# Answers with `status` and closes behind it: for what was not understood. False: no room now.
cdef bint refuse_request(HttpSession* session, int status, bint head_only, int minor_version) noexcept nogil
# Queues as much of the response's body as there is room for; session.responding is False when that was all.
cdef void continue_response(HttpSession* session) noexcept nogil
