# Endpoints of a client (connections, listeners, the ring itself): their table, their queues, and what their connections report.
# Engine thread only.

from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t

from kdaemon_pyx.client_types cimport Client, ClientEndpoint, ClientService

# A new endpoint, NULL at the client's limit.
cdef ClientEndpoint* client_endpoint_new(Client* client, uint8_t kind) noexcept nogil
# Ends every operation in its queues with ECANCELED and returns it to the table. Its connection must be gone.
cdef void client_endpoint_free(Client* client, ClientEndpoint* endpoint) noexcept nogil
# The endpoint of a handle; NULL: none of this client, or its CLOSE was carried out, or nobody was told its handle yet.
cdef ClientEndpoint* client_endpoint_find(Client* client, uint64_t handle) noexcept nogil
cdef uint64_t client_endpoint_handle(ClientEndpoint* endpoint) noexcept nogil

# The one place where an operation ends: out of its queue, its deadline gone, its completion posted, its barrier looked at.
cdef void client_finish(Client* client, uint32_t slot, int64_t result, uint32_t detail) noexcept nogil
# Its barrier may be over: client_run_ready() will look.
cdef void client_make_ready(Client* client, ClientEndpoint* endpoint) noexcept nogil
# Hand queued WRITEs to the connection, then SHUTDOWN and CLOSE when their turn comes. May free the endpoint.
cdef void client_pump_writes(Client* client, ClientEndpoint* endpoint) noexcept nogil
# End a WRITE, SHUTDOWN or CLOSE with `error`, a WRITE that has moved something with a short count.
cdef void client_finish_write(Client* client, uint32_t slot, int32_t error) noexcept nogil
# End the READs with ECANCELED. False: the first one's memory is still with the connection; client_received() goes on.
cdef bint client_cancel_reads(Client* client, ClientEndpoint* endpoint) noexcept nogil
# Give accepted connections to waiting ACCEPTs.
cdef void client_match_accepts(Client* client, ClientEndpoint* listener) noexcept nogil

# --- called by the backend -------------------------------------------------------------------------------------------

# Plaintext is there: the number of bytes taken, 0 when no READ waits.
cdef uint64_t client_deliver(ClientEndpoint* endpoint, const uint8_t* data, uint64_t length) noexcept nogil
# The same, and more may come at once: the last READ stays open until client_filled().
cdef uint64_t client_fill(ClientEndpoint* endpoint, const uint8_t* data, uint64_t length) noexcept nogil
cdef void client_filled(ClientEndpoint* endpoint) noexcept nogil
# Borrowed memory comes back with this many bytes in it; 0: nothing came, cancelled.
cdef void client_received(ClientEndpoint* endpoint, uint64_t length) noexcept nogil
# write() answered 0 before and takes bytes again.
cdef void client_writable(ClientEndpoint* endpoint) noexcept nogil
# Everything that write() took has left.
cdef void client_sent(ClientEndpoint* endpoint) noexcept nogil
# close_notify was received and everything before it delivered.
cdef void client_end_of_data(ClientEndpoint* endpoint) noexcept nogil
# Nothing more can be read (truncation), writing may still be possible.
cdef void client_read_failed(ClientEndpoint* endpoint, int32_t error, uint32_t detail) noexcept nogil
# The connection is gone, nothing touches the client's memory for it any more. error: negative errno or 0 (orderly).
cdef void client_connection_closed(ClientEndpoint* endpoint, int32_t error, uint32_t detail) noexcept nogil
# A connection with this token is established. The endpoint it belongs to, NULL: nobody wants it, close it. plain: without TLS; the token is
# the endpoint's own then, a listener's for each of its connections, and stays valid.
cdef ClientEndpoint* client_established(ClientService* service, uint32_t token, void* connection, bint plain) noexcept nogil
