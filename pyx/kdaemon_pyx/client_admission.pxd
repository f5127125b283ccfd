# The Python object through which a worker's control thread sees its libtls clients. It owns the ClientService.

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.client_types cimport ClientService

cdef class Clients:
    cdef ClientService* service
    cdef uint32_t last_generation
    cdef _command(self, uint8_t kind, uint64_t client, uint32_t slot, uint32_t sequence, int64_t result, uint32_t detail, bytes info)
