"""Connections that change hands: to a service without TLS, from there to the handshake, out of the daemon."""

from libc.stdint cimport uint32_t

from kdaemon_pyx.core cimport Connection


cdef void changeover_plain(Connection* c, uint32_t service, uint32_t site) noexcept nogil
cdef int changeover_handshake(Connection* c) noexcept nogil
cdef void changeover_export(Connection* c) noexcept nogil
