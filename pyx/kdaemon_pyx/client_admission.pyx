"""Clients of a worker as its control thread sees them: admission, answers to operations, events, counters."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy
from posix.unistd cimport read

from kdaemon_pyx.client_abi cimport CLIENT_VERSION_MINOR, client_parameters
from kdaemon_pyx.client_control cimport (
    client_binding_accepted, client_binding_describe, client_binding_free, client_command_push, client_event_free, client_events_take,
)
from kdaemon_pyx.client_queue cimport client_create, client_free
from kdaemon_pyx.client_service cimport client_service_destroy, client_service_initialize, client_service_new
from kdaemon_pyx.client_types cimport (
    CLIENT_COMMAND_ATTACH, CLIENT_COMMAND_COMPLETE, CLIENT_COMMAND_DETACH, CLIENT_EVENT_CANCEL,
    CLIENT_EVENT_DETACHED, CLIENT_EVENT_DETACHING, CLIENT_EVENT_LISTENER_CLOSED, CLIENT_EVENT_OPERATION, CLIENT_NONE, Client,
    ClientCommand, ClientEvent, pthread_mutex_t,
)

import errno as errno_module
import os

cdef extern from "pthread.h" nogil:
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)

EVENT_OPERATION = CLIENT_EVENT_OPERATION
EVENT_CANCEL = CLIENT_EVENT_CANCEL
EVENT_LISTENER_CLOSED = CLIENT_EVENT_LISTENER_CLOSED
EVENT_DETACHING = CLIENT_EVENT_DETACHING
EVENT_DETACHED = CLIENT_EVENT_DETACHED

cdef tuple DETACH_REASONS = ("asked", "hang-up", "submission tail out of range", "completion head out of range")


cdef uint32_t power_of_two(uint32_t value) noexcept nogil:
    cdef uint32_t result = 1
    while result < value:
        result <<= 1
    return result


cdef class Clients:
    """The clients of one worker, as its control thread sees them.

    Thread-safety: the methods belong to one control thread; the engine thread gets the object once, before it runs. The object must
    outlive the engine's run.
    """

    def __cinit__(self, *, clients_max: int = 64):
        cdef int error
        self.service = client_service_new()
        if self.service == NULL:
            raise MemoryError
        error = client_service_initialize(self.service, clients_max)
        if error < 0:
            raise OSError(-error, os.strerror(-error))

    def __dealloc__(self):
        if self.service != NULL:
            client_service_destroy(self.service)

    def event_fd(self) -> int:
        """eventfd that becomes readable when ``events()`` has something (owner: this object)."""
        return self.service.control_fd

    def attach(
        self, *, submission_entries: int, completion_entries: int, slot_count: int, arena_size: int, connections_max: int,
        version_minor: int = CLIENT_VERSION_MINOR,
    ) -> tuple[int, int, int, int]:
        """Makes a client's shared memory. Sizes are rounded up as the ABI demands; version_minor is the one in force.

        Returns (client, memory_fd, doorbell_fd, memory_size); the caller passes both fds to the program and closes them. Raises OSError: EUSERS when all places are taken, or what memfd_create said.
        """
        cdef Client* client = NULL
        cdef ClientCommand* command
        cdef int doorbell = -1
        cdef int error
        cdef uint32_t slots = max(1, slot_count)
        cdef uint32_t submissions = power_of_two(max(slots, submission_entries))
        cdef uint32_t completions = power_of_two(max(submissions, completion_entries))
        cdef uint32_t index
        command = <ClientCommand*> calloc(1, sizeof(ClientCommand))
        if command == NULL:
            raise MemoryError
        error = client_create(self.service, submissions, completions, slots, arena_size, connections_max, &client, &doorbell)
        if error < 0:
            free(command)
            raise OSError(-error, os.strerror(-error))
        client.header.version_minor = version_minor
        self.last_generation = self.last_generation % 0x7fffffff + 1
        pthread_mutex_lock(&self.service.mutex)
        for index in range(self.service.clients_max):
            if not self.service.places[index]:
                self.service.places[index] = 1
                break
        else:
            index = CLIENT_NONE
        pthread_mutex_unlock(&self.service.mutex)
        if index == CLIENT_NONE:
            free(command)
            client_free(client)
            os.close(doorbell)
            raise OSError(errno_module.EUSERS, f"all {self.service.clients_max} places for libtls clients are taken")
        client.index = index
        client.generation = self.last_generation
        command.kind = CLIENT_COMMAND_ATTACH
        command.client = client
        try:
            memory_fd = os.dup(client.memory_fd)
        except OSError:              # no descriptor is left: nor may a place be lost
            pthread_mutex_lock(&self.service.mutex)
            self.service.places[index] = 0
            pthread_mutex_unlock(&self.service.mutex)
            free(command)
            client_free(client)
            os.close(doorbell)
            raise
        result = (<uint64_t> client.generation << 32 | client.index, memory_fd, doorbell, client.memory_size)
        # The command's mutex orders what was written here before the engine thread's first look at the client.
        client_command_push(self.service, command)
        return result

    def detach(self, client: int) -> None:
        """Cuts a client off -> EVENT_DETACHING, then EVENT_DETACHED when its connections are joined and its memory is returned."""
        self._command(CLIENT_COMMAND_DETACH, client, 0, 0, 0, 0, b"")

    def complete(self, client: int, slot: int, sequence: int, result: int, detail: int = 0, info: bytes = b"") -> None:
        """Answers an EVENT_OPERATION. result: 0, or a negative errno. info: what INFO will say of a listener.

        An established connection is answered by the engine instead, when ``install`` is given the operation's token.
        """
        self._command(CLIENT_COMMAND_COMPLETE, client, slot, sequence, result, detail, info)

    cdef _command(self, uint8_t kind, uint64_t client, uint32_t slot, uint32_t sequence, int64_t result, uint32_t detail, bytes info):
        cdef ClientCommand* command = <ClientCommand*> calloc(1, sizeof(ClientCommand))
        if command == NULL:
            raise MemoryError
        command.kind = kind
        command.client_index = <uint32_t> client
        command.client_generation = client >> 32
        command.slot = slot
        command.sequence = sequence
        command.result = result
        command.detail = detail
        if info:
            command.info = <uint8_t*> malloc(len(info))
            if command.info == NULL:
                free(command)
                raise MemoryError
            memcpy(command.info, <const char*> info, len(info))
            command.info_length = len(info)
        client_command_push(self.service, command)

    def accepted(self, listener: int, info: bytes) -> int:
        """Token to install a connection of this listener with; 0 if the listener is gone. ``forget`` it if install does not happen."""
        return client_binding_accepted(self.service, listener, <const uint8_t*> <const char*> info, len(info))

    def describe(self, token: int, info: bytes) -> None:
        """Says what INFO will answer for the connection that an operation's token stands for."""
        client_binding_describe(self.service, token, <const uint8_t*> <const char*> info, len(info))

    def forget(self, token: int) -> None:
        """Frees a token of ``accepted`` that will not be installed."""
        client_binding_free(self.service, token)

    def events(self) -> list[tuple[object, ...]]:
        """Takes all queued events: tuples that begin with their kind and the client.

        EVENT_OPERATION: (…, opcode, slot, sequence, token, handle, user_data, timeout_ns, parameters: dict, data: bytes, connection)
        EVENT_CANCEL: (…, slot, sequence, token, errno): answer the operation soon
        EVENT_LISTENER_CLOSED: (…, token, handle)
        EVENT_DETACHING: (…, reason: str), EVENT_DETACHED: (…, reason: str)
        """
        cdef ClientEvent* event
        cdef ClientEvent* following
        cdef uint64_t value
        cdef list result = []
        read(self.service.control_fd, &value, sizeof(value))
        event = client_events_take(self.service)
        while event != NULL:
            following = event.next
            result.append(event_tuple(event))
            client_event_free(event)
            event = following
        return result

    def status(self) -> list[dict[str, int]]:
        """Counters of every attached client; a snapshot that need not be of one instant."""
        cdef uint32_t i
        cdef Client* client
        cdef list result = []
        pthread_mutex_lock(&self.service.mutex)
        for i in range(self.service.clients_used):
            client = self.service.clients[i]
            if client != NULL:
                result.append({
                    "client": <uint64_t> client.generation << 32 | client.index,
                    "operations": client.counters.submissions,
                    "rejected": client.counters.rejected,
                    "completions": client.counters.completions,
                    "in_flight": client.in_flight,
                    "connections": client.endpoint_count,
                    "bytes_read": client.counters.bytes_read,
                    "bytes_written": client.counters.bytes_written,
                    "doorbells_sent": client.counters.doorbells_sent,
                    "doorbells_received": client.counters.doorbells_received,
                    "memory_size": client.memory_size,
                })
        pthread_mutex_unlock(&self.service.mutex)
        return result


cdef dict parameters_dict(client_parameters* parameters):
    return {
        "flags": parameters.flags,
        "port": parameters.port,
        "backlog": parameters.backlog,
        "host": (<char*> parameters.host)[:parameters.host_length],
        "server_name": (<char*> parameters.server_name)[:parameters.server_name_length],
        "alpn": (<char*> parameters.alpn)[:parameters.alpn_length],
        "certificate": (<char*> parameters.certificate)[:parameters.certificate_length],
    }


cdef tuple event_tuple(ClientEvent* event):
    cdef uint64_t client = <uint64_t> event.client_generation << 32 | event.client_index
    if event.kind == CLIENT_EVENT_OPERATION:
        return (
            event.kind, client, event.opcode, event.slot, event.sequence, event.binding, event.handle, event.user_data,
            event.timeout_ns, parameters_dict(&event.parameters), (<char*> event.data)[:event.data_length], event.connection,
        )
    if event.kind == CLIENT_EVENT_CANCEL:
        return (event.kind, client, event.slot, event.sequence, event.binding, event.reason)
    if event.kind == CLIENT_EVENT_LISTENER_CLOSED:
        return (event.kind, client, event.binding, event.handle)
    return (event.kind, client, DETACH_REASONS[event.reason])
