# What a request asks for: path and host. `path` has room for PATH_BYTES_MAX bytes.

from libc.stdint cimport uint8_t

from kdaemon_pyx.http_request cimport HttpRequest, Slice

# The value of Host, or the authority of a target, without its port. 0 or 400.
cdef int take_host(Slice value, Slice* host) noexcept nogil
# In origin, absolute or asterisk form: path, query, target and host of `request`. 0, 400, 405 or 414.
cdef int parse_target(const uint8_t* start, const uint8_t* end, uint8_t* path, HttpRequest* request) noexcept nogil
