"""Events, commands and tokens between the engine thread and the control thread of a worker.

Two singly linked lists and a table of bindings under one mutex that is never held across anything that can block. Each list has
an eventfd that is written when the list was empty before.
"""

from libc.errno cimport ENOENT, ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset
from posix.unistd cimport close, write

from kdaemon_pyx.client_types cimport (
    CLIENT_NONE, Client, ClientBinding, ClientCommand, ClientEndpoint, ClientEvent, ClientService, pthread_mutex_t,
)

cdef extern from "pthread.h" nogil:
    int pthread_mutex_init(pthread_mutex_t* mutex, const void* attributes)
    int pthread_mutex_destroy(pthread_mutex_t* mutex)
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)

cdef extern from "sys/eventfd.h" nogil:
    int eventfd(unsigned int initial, int flags)
    enum:
        EFD_CLOEXEC
        EFD_NONBLOCK


cdef int client_control_initialize(ClientService* service, uint32_t bindings_max) noexcept nogil:
    pthread_mutex_init(&service.mutex, NULL)
    service.bindings = <ClientBinding*> calloc(bindings_max, sizeof(ClientBinding))
    service.bindings_max = bindings_max
    service.binding_free = CLIENT_NONE
    service.control_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    service.command_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if service.bindings == NULL:
        return -ENOMEM
    if service.control_fd < 0 or service.command_fd < 0:
        return -errno
    return 0


cdef void client_control_destroy(ClientService* service) noexcept nogil:
    cdef ClientEvent* event = client_events_take(service)
    cdef ClientEvent* next_event
    cdef ClientCommand* command = client_commands_take(service)
    cdef ClientCommand* next_command
    cdef uint32_t i
    while event != NULL:
        next_event = event.next
        client_event_free(event)
        event = next_event
    while command != NULL:
        next_command = command.next
        client_command_free(command)
        command = next_command
    for i in range(service.bindings_used):
        free(service.bindings[i].info)
    free(service.bindings)
    close(service.control_fd)
    close(service.command_fd)
    pthread_mutex_destroy(&service.mutex)


cdef ClientEvent* client_event_new(Client* client, uint8_t kind) noexcept nogil:
    cdef ClientEvent* event = <ClientEvent*> calloc(1, sizeof(ClientEvent))
    if event != NULL:
        event.kind = kind
        event.client_index = client.index
        event.client_generation = client.generation
    return event


cdef void client_event_push(ClientService* service, ClientEvent* event) noexcept nogil:
    cdef uint64_t one = 1
    cdef bint was_empty
    event.next = NULL
    pthread_mutex_lock(&service.mutex)
    was_empty = service.outgoing_head == NULL
    if was_empty:
        service.outgoing_head = event
    else:
        service.outgoing_tail.next = event
    service.outgoing_tail = event
    pthread_mutex_unlock(&service.mutex)
    if was_empty:
        write(service.control_fd, &one, sizeof(one))


cdef ClientEvent* client_events_take(ClientService* service) noexcept nogil:
    cdef ClientEvent* event
    pthread_mutex_lock(&service.mutex)
    event = service.outgoing_head
    service.outgoing_head = service.outgoing_tail = NULL
    pthread_mutex_unlock(&service.mutex)
    return event


cdef void client_event_free(ClientEvent* event) noexcept nogil:
    free(event.data)
    free(event)


cdef void client_command_push(ClientService* service, ClientCommand* command) noexcept nogil:
    cdef uint64_t one = 1
    cdef bint was_empty
    command.next = NULL
    pthread_mutex_lock(&service.mutex)
    was_empty = service.commands_head == NULL
    if was_empty:
        service.commands_head = command
    else:
        service.commands_tail.next = command
    service.commands_tail = command
    pthread_mutex_unlock(&service.mutex)
    if was_empty:
        write(service.command_fd, &one, sizeof(one))


cdef ClientCommand* client_commands_take(ClientService* service) noexcept nogil:
    cdef ClientCommand* command
    pthread_mutex_lock(&service.mutex)
    command = service.commands_head
    service.commands_head = service.commands_tail = NULL
    pthread_mutex_unlock(&service.mutex)
    return command


cdef void client_command_free(ClientCommand* command) noexcept nogil:
    free(command.info)
    free(command)


# A token is (generation << 16 | index): what is left of an old use of the table entry does not match the new one.
cdef ClientBinding* binding_allocate(ClientService* service, uint32_t* token) noexcept nogil:
    cdef uint32_t index = service.binding_free
    cdef uint32_t generation
    cdef ClientBinding* binding
    if index != CLIENT_NONE:
        service.binding_free = service.bindings[index].free_next
    elif service.bindings_used < service.bindings_max:
        index = service.bindings_used
        service.bindings_used += 1
    else:
        return NULL
    binding = &service.bindings[index]
    generation = binding.generation % 0x7fff + 1
    memset(binding, 0, sizeof(ClientBinding))
    binding.generation = generation
    binding.used = True
    token[0] = generation << 16 | index
    return binding


cdef ClientBinding* binding_find(ClientService* service, uint32_t token) noexcept nogil:
    cdef uint32_t index = token & 0xffff
    if index >= service.bindings_used or not service.bindings[index].used or service.bindings[index].generation != token >> 16:
        return NULL
    return &service.bindings[index]


cdef void binding_release(ClientService* service, ClientBinding* binding) noexcept nogil:
    binding.used = False
    binding.info = NULL
    binding.free_next = service.binding_free
    service.binding_free = <uint32_t> (binding - service.bindings)


cdef uint8_t* copy_bytes(const uint8_t* data, uint32_t length) noexcept nogil:
    cdef uint8_t* copy = <uint8_t*> malloc(length)
    if copy != NULL:
        memcpy(copy, data, length)
    return copy


cdef uint32_t client_binding_new(ClientService* service, Client* client, ClientEndpoint* endpoint) noexcept nogil:
    cdef uint32_t token = 0
    cdef ClientBinding* binding
    pthread_mutex_lock(&service.mutex)
    binding = binding_allocate(service, &token)
    if binding != NULL:
        binding.client_index = client.index
        binding.client_generation = client.generation
        binding.endpoint_index = endpoint.index
        binding.endpoint_generation = endpoint.generation
    pthread_mutex_unlock(&service.mutex)
    return token


cdef uint32_t client_binding_accepted(ClientService* service, uint32_t listener, const uint8_t* info, uint32_t length) noexcept nogil:
    cdef uint32_t token = 0
    cdef ClientBinding* parent
    cdef ClientBinding* binding
    cdef uint8_t* copy = copy_bytes(info, length)
    if copy == NULL:
        return 0
    pthread_mutex_lock(&service.mutex)
    parent = binding_find(service, listener)
    if parent != NULL:
        binding = binding_allocate(service, &token)
        if binding != NULL:
            binding.client_index = parent.client_index
            binding.client_generation = parent.client_generation
            binding.endpoint_index = parent.endpoint_index
            binding.endpoint_generation = parent.endpoint_generation
            binding.info = copy
            binding.info_length = length
            copy = NULL
    pthread_mutex_unlock(&service.mutex)
    free(copy)
    return token


cdef int client_binding_describe(ClientService* service, uint32_t token, const uint8_t* info, uint32_t length) noexcept nogil:
    cdef ClientBinding* binding
    cdef uint8_t* copy = copy_bytes(info, length)
    if copy == NULL:
        return -ENOMEM
    pthread_mutex_lock(&service.mutex)
    binding = binding_find(service, token)
    if binding != NULL:
        free(binding.info)
        binding.info = copy
        binding.info_length = length
        copy = NULL
    pthread_mutex_unlock(&service.mutex)
    free(copy)
    return -ENOENT if binding == NULL else 0


cdef bint client_binding_get(ClientService* service, uint32_t token, bint consume, ClientBinding* binding) noexcept nogil:
    cdef ClientBinding* found
    pthread_mutex_lock(&service.mutex)
    found = binding_find(service, token)
    if found != NULL:
        binding[0] = found[0]
        if consume:
            binding_release(service, found)
    pthread_mutex_unlock(&service.mutex)
    return found != NULL


cdef void client_binding_free(ClientService* service, uint32_t token) noexcept nogil:
    cdef ClientBinding binding
    if client_binding_get(service, token, True, &binding):
        free(binding.info)


cdef void client_binding_free_all(ClientService* service, uint32_t client_index, uint32_t client_generation) noexcept nogil:
    cdef uint32_t i
    cdef ClientBinding* binding
    pthread_mutex_lock(&service.mutex)
    for i in range(service.bindings_used):
        binding = &service.bindings[i]
        if binding.used and binding.client_index == client_index and binding.client_generation == client_generation:
            free(binding.info)
            binding_release(service, binding)
    pthread_mutex_unlock(&service.mutex)
