"""The clients of one worker: attach, turns, sleep, detach; and what the control thread sees of them.

Fairness: a turn takes at most ``SUBMISSIONS_PER_TURN`` submissions of each client, starting with another client each time.
"""

from libc.errno cimport ENOMEM, errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, itimerspec, timespec
from posix.unistd cimport close, read

from kdaemon_pyx.client_abi cimport (
    client_say_asleep, client_say_awake, client_submission,
)
from kdaemon_pyx.client_control cimport (
    client_binding_free_all, client_command_free,
    client_commands_take, client_control_destroy, client_control_initialize,
    client_event_new, client_event_push,
)
from kdaemon_pyx.client_operations cimport client_control_complete, client_expire, client_run_ready, client_submit
from kdaemon_pyx.client_queue cimport (
    client_drain_doorbell, client_free, client_has_submissions, client_next_submission,
    client_publish_completions,
)
from kdaemon_pyx.client_types cimport (
    CLIENT_ATTACHED, CLIENT_COMMAND_ATTACH, CLIENT_COMMAND_DETACH, CLIENT_DETACHING,
    CLIENT_EVENT_DETACHED, CLIENT_EVENT_DETACHING,
    CLIENT_NONE, DETACH_ASKED, DETACH_HANG_UP, Client, ClientCommand,
    ClientEvent, ClientService, pthread_mutex_t,
)

cdef extern from "pthread.h" nogil:
    int pthread_mutex_lock(pthread_mutex_t* mutex)
    int pthread_mutex_unlock(pthread_mutex_t* mutex)

cdef extern from "stdlib.h" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t size)

cdef extern from "sys/epoll.h" nogil:
    ctypedef union epoll_data_t:
        uint64_t u64
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll_fd, int operation, int fd, epoll_event* event)
    int epoll_wait(int epoll_fd, epoll_event* events, int events_max, int timeout_ms)
    enum:
        EPOLL_CLOEXEC
        EPOLL_CTL_ADD
        EPOLL_CTL_DEL
        EPOLLET
        EPOLLIN
        EPOLLHUP
        EPOLLRDHUP
        EPOLLERR

cdef extern from "sys/timerfd.h" nogil:
    int timerfd_create(int clock, int flags)
    int timerfd_settime(int fd, int flags, const itimerspec* value, itimerspec* old)
    enum:
        TFD_CLOEXEC
        TFD_NONBLOCK
        TFD_TIMER_ABSTIME

cdef enum:
    SUBMISSIONS_PER_TURN = 64
    EPOLL_BATCH = 64
    BINDINGS_MAX = 65536

# What an epoll entry stands for: a client's index, or one of these.
cdef enum:
    WAKE_TIMER = 0x7ffffffe
    WAKE_COMMAND = 0x7fffffff

cdef int service_watch(ClientService* service, int fd, uint64_t what) noexcept nogil:
    cdef epoll_event event
    event.events = EPOLLIN | EPOLLRDHUP | EPOLLET
    event.data.u64 = what
    return -errno if epoll_ctl(service.epoll_fd, EPOLL_CTL_ADD, fd, &event) < 0 else 0


cdef ClientService* client_service_new() noexcept nogil:
    cdef void* memory = NULL
    if posix_memalign(&memory, 64, sizeof(ClientService)) != 0:
        return NULL
    memset(memory, 0, sizeof(ClientService))
    return <ClientService*> memory


cdef int client_service_initialize(ClientService* service, uint32_t clients_max) noexcept nogil:
    cdef int error
    service.epoll_fd = epoll_create1(EPOLL_CLOEXEC)
    service.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK)
    if service.epoll_fd < 0 or service.timer_fd < 0:
        return -errno
    service.clients_max = clients_max
    service.clients = <Client**> calloc(clients_max, sizeof(Client*))
    service.places = <uint8_t*> calloc(clients_max, 1)
    if service.clients == NULL or service.places == NULL:
        return -ENOMEM
    error = client_control_initialize(service, BINDINGS_MAX)
    if error == 0:
        error = service_watch(service, service.timer_fd, WAKE_TIMER)
    if error == 0:
        error = service_watch(service, service.command_fd, WAKE_COMMAND)
    return error


cdef void read_clock(ClientService* service) noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    service.now_ns = <uint64_t> now.tv_sec * 1000000000 + <uint64_t> now.tv_nsec


cdef void tell(Client* client, uint8_t kind) noexcept nogil:
    cdef ClientEvent* event = client_event_new(client, kind)
    if event != NULL:
        event.reason = client.detach_reason
        client_event_push(client.service, event)


cdef void begin_detach(Client* client, uint8_t reason) noexcept nogil:
    cdef uint32_t i
    cdef ClientService* service = client.service
    if client.state != CLIENT_ATTACHED:
        return
    client.state = CLIENT_DETACHING
    client.detach_reason = reason
    epoll_ctl(service.epoll_fd, EPOLL_CTL_DEL, client.doorbell_fd, NULL)
    client_binding_free_all(service, client.index, client.generation)
    tell(client, CLIENT_EVENT_DETACHING)
    for i in range(1, client.endpoints_used + 1):
        if client.endpoints[i].connection != NULL:
            service.backend.close(&client.endpoints[i], False)


# Everything is joined: give the memory back.
cdef void end_detach(Client* client) noexcept nogil:
    cdef ClientService* service = client.service
    cdef uint32_t i
    tell(client, CLIENT_EVENT_DETACHED)
    for i in range(1, client.endpoints_used + 1):
        free(client.endpoints[i].info)
    pthread_mutex_lock(&service.mutex)
    service.clients[client.index] = NULL
    service.places[client.index] = 0
    pthread_mutex_unlock(&service.mutex)
    client_free(client)


cdef void carry_out(ClientService* service, ClientCommand* command) noexcept nogil:
    cdef Client* client
    if command.kind == CLIENT_COMMAND_ATTACH:
        client = command.client
        command.client = NULL
        pthread_mutex_lock(&service.mutex)
        service.clients[client.index] = client
        if client.index >= service.clients_used:
            service.clients_used = client.index + 1
        pthread_mutex_unlock(&service.mutex)
        if service_watch(service, client.doorbell_fd, client.index) < 0:
            begin_detach(client, DETACH_ASKED)
        return
    if command.client_index >= service.clients_max:
        return
    client = service.clients[command.client_index]
    if client == NULL or client.generation != command.client_generation or client.state != CLIENT_ATTACHED:
        return
    if command.kind == CLIENT_COMMAND_DETACH:
        begin_detach(client, DETACH_ASKED)
    else:
        client_control_complete(client, command)


cdef uint32_t client_turn(Client* client) noexcept nogil:
    cdef client_submission submission
    cdef uint32_t done = 0
    cdef int got
    if client.state == CLIENT_DETACHING:
        if client.connection_count == 0:
            end_detach(client)
            return 1
        return 0
    if client.heap_length and client.operations[client.heap[0]].deadline_ns <= client.service.now_ns:
        client_expire(client)
    while done < SUBMISSIONS_PER_TURN:
        got = client_next_submission(client, &submission)
        if got < 0:
            begin_detach(client, <uint8_t> -got)
            return 1
        if got == 0:
            break
        done += 1
        client_submit(client, &submission)
    if client.ready_head != CLIENT_NONE:
        client_run_ready(client)
    return done


cdef uint32_t client_service_turn(ClientService* service) noexcept nogil:
    cdef ClientCommand* command
    cdef ClientCommand* next_command
    cdef Client* client
    cdef uint32_t done = 0
    cdef uint32_t index
    cdef int _
    if service.commands_head != NULL:       # a look without the mutex: a late one is seen when command_fd wakes us
        command = client_commands_take(service)
        while command != NULL:
            next_command = command.next
            carry_out(service, command)
            client_command_free(command)
            command = next_command
            done += 1
    if service.clients_used == 0:
        return done
    read_clock(service)
    if service.fair_start >= service.clients_used:
        service.fair_start = 0
    index = service.fair_start
    for _ in range(<int> service.clients_used):
        client = service.clients[index]
        if client != NULL:
            done += client_turn(client)
        index += 1
        if index == service.clients_used:
            index = 0
    service.fair_start += 1
    return done


cdef void client_service_publish(ClientService* service) noexcept nogil:
    cdef uint32_t i
    for i in range(service.clients_used):
        if service.clients[i] != NULL and service.clients[i].state == CLIENT_ATTACHED:
            client_publish_completions(service.clients[i])


cdef bint client_service_prepare_sleep(ClientService* service) noexcept nogil:
    cdef Client* client
    cdef uint64_t earliest_ns = 0
    cdef uint64_t deadline_ns
    cdef uint32_t i
    cdef itimerspec timer
    cdef bint work = False
    for i in range(service.clients_used):
        client = service.clients[i]
        if client == NULL:
            continue
        if client.state != CLIENT_ATTACHED:
            work = work or client.connection_count == 0
            continue
        client_publish_completions(client)
        # Pairs with the program's client_must_ring() after it published submission_tail or completion_head.
        client_say_asleep(&client.header.daemon_state)
        if client_has_submissions(client) or client.ready_head != CLIENT_NONE:
            work = True
        if client.heap_length:
            deadline_ns = client.operations[client.heap[0]].deadline_ns
            if earliest_ns == 0 or deadline_ns < earliest_ns:
                earliest_ns = deadline_ns
    if work:
        client_service_awake(service)
        return True
    if earliest_ns != service.timer_armed_ns:
        service.timer_armed_ns = earliest_ns
        memset(&timer, 0, sizeof(timer))
        timer.it_value.tv_sec = earliest_ns // 1000000000
        timer.it_value.tv_nsec = earliest_ns % 1000000000
        timerfd_settime(service.timer_fd, TFD_TIMER_ABSTIME, &timer, NULL)
    return False


cdef int client_service_wake(ClientService* service) noexcept nogil:
    cdef epoll_event[EPOLL_BATCH] events
    cdef uint64_t value
    cdef uint64_t what
    cdef Client* client
    cdef int count = epoll_wait(service.epoll_fd, events, EPOLL_BATCH, 0)
    cdef int i
    for i in range(count):
        what = events[i].data.u64
        if what == WAKE_TIMER:
            read(service.timer_fd, &value, sizeof(value))
            service.timer_armed_ns = 0
        elif what == WAKE_COMMAND:
            read(service.command_fd, &value, sizeof(value))
        else:
            client = service.clients[what]
            if client == NULL:
                continue
            if events[i].events & (EPOLLHUP | EPOLLRDHUP | EPOLLERR):
                begin_detach(client, DETACH_HANG_UP)
                continue
            client_drain_doorbell(client)
    client_service_awake(service)
    return count


cdef void client_service_awake(ClientService* service) noexcept nogil:
    cdef uint32_t i
    for i in range(service.clients_used):
        if service.clients[i] != NULL and service.clients[i].state == CLIENT_ATTACHED:
            client_say_awake(&service.clients[i].header.daemon_state)


cdef void client_service_detach_all(ClientService* service) noexcept nogil:
    cdef uint32_t i
    for i in range(service.clients_used):
        if service.clients[i] != NULL:
            begin_detach(service.clients[i], DETACH_ASKED)


cdef bint client_service_is_empty(ClientService* service) noexcept nogil:
    cdef uint32_t i
    for i in range(service.clients_used):
        if service.clients[i] != NULL:
            return False
    return True


cdef void client_service_destroy(ClientService* service) noexcept nogil:
    cdef ClientCommand* command
    cdef ClientCommand* following
    cdef Client* client
    cdef uint32_t i
    cdef uint32_t j
    for i in range(service.clients_used):
        client = service.clients[i]
        if client != NULL:
            for j in range(1, client.endpoints_used + 1):
                free(client.endpoints[j].info)
            client_free(client)
    command = client_commands_take(service)
    while command != NULL:
        following = command.next
        if command.client != NULL:
            client_free(command.client)      # attached, but the engine thread never ran
        client_command_free(command)
        command = following
    free(service.clients)
    free(service.places)
    client_control_destroy(service)
    close(service.timer_fd)
    close(service.epoll_fd)
    free(service)
