# All clients of one worker. The engine's loop calls turn() each time round, prepare_sleep() before it blocks and wake() when
# service.epoll_fd became readable. Engine thread only.

from libc.stdint cimport uint32_t

from kdaemon_pyx.client_types cimport ClientService

# One turn over all clients; the number of things done (0: nothing to do). What completed is not published yet.
cdef uint32_t client_service_turn(ClientService* service) noexcept nogil
# Shows the clients what has completed, and rings those that sleep.
cdef void client_service_publish(ClientService* service) noexcept nogil
# Publish, tell the clients that the daemon sleeps and look once more. True: there is work, do not sleep.
cdef bint client_service_prepare_sleep(ClientService* service) noexcept nogil
# Take doorbells, hang-ups, the timer and commands off service.epoll_fd; how many there were. Never blocks.
cdef int client_service_wake(ClientService* service) noexcept nogil
# Something else woke the engine: there is no need to ring.
cdef void client_service_awake(ClientService* service) noexcept nogil
# Detach every client; turn() goes on joining them until client_service_is_empty().
cdef void client_service_detach_all(ClientService* service) noexcept nogil
cdef bint client_service_is_empty(ClientService* service) noexcept nogil

# Zeroed and aligned; NULL without memory.
cdef ClientService* client_service_new() noexcept nogil
# On error the caller destroys it.
cdef int client_service_initialize(ClientService* service, uint32_t clients_max) noexcept nogil
# Frees everything, `service` included. The engine thread does not run any more.
cdef void client_service_destroy(ClientService* service) noexcept nogil
