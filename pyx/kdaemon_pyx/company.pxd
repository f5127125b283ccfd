"""Waits that are held for company."""

from libc.stdint cimport uint32_t

from kdaemon_pyx.core cimport Core


cdef uint32_t company_wait_us(Core* core) noexcept nogil
