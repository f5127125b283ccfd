# What a client may ask: validation, start, barrier, cancel, deadlines, answers of the control thread. Engine thread only.

from libc.stdint cimport uint32_t, uint64_t

from kdaemon_pyx.client_abi cimport client_submission
from kdaemon_pyx.client_types cimport Client, ClientCommand, ClientService

# Validate one private copy of a submission and carry it out. It will have exactly one completion.
cdef void client_submit(Client* client, client_submission* submission) noexcept nogil
# Start what barriers held back, as far as they are over.
cdef void client_run_ready(Client* client) noexcept nogil
# End operations whose deadline is before service.now_ns.
cdef void client_expire(Client* client) noexcept nogil
# The control thread's answer to an operation; ignored if the operation is gone.
cdef void client_control_complete(Client* client, ClientCommand* command) noexcept nogil
