"""Python face of the engine: what the control thread of a worker sees. The contract is engine.pyi.

Owner of everything here: the Engine object. ``run`` belongs to the engine thread; every other method to one control thread, except
``counters``, which anybody may call.
"""

import os

from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcpy, memset

from kdaemon_pyx.accept cimport LISTEN_LIMITED, LISTEN_TLS
from kdaemon_pyx.atomics cimport exchange_u32, fence_seq_cst, load_relaxed_u32, load_relaxed_u64
from kdaemon_pyx.buffers cimport pool_setup, pool_teardown
from kdaemon_pyx.core cimport (
    CLOSE_REASON_COUNT, CONNECTION_STRIDE, LISTENERS_MAX, REASON_COUNT, RECORD_LAYER_KERNEL, RECORD_LAYER_NONE, SERVICES_MAX, Core,
    KeyMaterial, Secrets)
from kdaemon_pyx.file_service cimport FileService
from kdaemon_pyx.libcrypto cimport OPENSSL_cleanse
from kdaemon_pyx.handshake_io cimport record_layer_reason
from kdaemon_pyx.lifecycle cimport (
    EVENT_KIND_ACCEPT_PAUSED, EVENT_KIND_CLOSED, EVENT_KIND_CONNECTED, EVENT_KIND_CONTROL_RECORD, EVENT_KIND_DRAINED, EVENT_KIND_END_OF_FILE, EVENT_KIND_EXPORTED,
    EVENT_KIND_INSTALLED, EVENT_KIND_KEY_LIMIT, EVENT_KIND_RECORDS, EVENT_KIND_REKEYED, EVENT_KIND_UNLISTENED, core_connections_setup,
    core_connections_teardown)
from kdaemon_pyx.loop cimport (
    COMMAND_ADOPT, COMMAND_CLOSE, COMMAND_DRAIN, COMMAND_EXPORT, COMMAND_INSTALL, COMMAND_LISTEN, COMMAND_PLAIN, COMMAND_RECEIVE, COMMAND_REKEY, COMMAND_SEND, COMMAND_SEND_CONTROL,
    COMMAND_START_TLS, COMMAND_STOP, COMMAND_UNLISTEN, loop_run, loop_setup, loop_teardown)
from kdaemon_pyx.record cimport suite_hash_length, suite_key_length
from kdaemon_pyx.service cimport ServiceObject
from kdaemon_pyx.spsc cimport Message, message_free, queue_pop, queue_push, queue_setup, queue_teardown


cdef extern from "<stdlib.h>" nogil:
    int posix_memalign(void** memory, size_t alignment, size_t size)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned int value, int flags)
    int EFD_CLOEXEC
    int EFD_NONBLOCK

cdef extern from "<unistd.h>" nogil:
    int64_t read(int fd, void* data, size_t length)
    int64_t write(int fd, const void* data, size_t length)
    int close(int fd)

cdef extern from "<signal.h>" nogil:
    ctypedef struct sigset_t:
        pass
    int SIG_BLOCK
    int SIG_SETMASK
    int sigfillset(sigset_t* set)
    int pthread_sigmask(int how, const sigset_t* set, sigset_t* old)

EVENT_RECORDS = EVENT_KIND_RECORDS
EVENT_END_OF_FILE = EVENT_KIND_END_OF_FILE
EVENT_CONTROL_RECORD = EVENT_KIND_CONTROL_RECORD
EVENT_INSTALLED = EVENT_KIND_INSTALLED
EVENT_CLOSED = EVENT_KIND_CLOSED
EVENT_ACCEPT_PAUSED = EVENT_KIND_ACCEPT_PAUSED
EVENT_UNLISTENED = EVENT_KIND_UNLISTENED
EVENT_DRAINED = EVENT_KIND_DRAINED
EVENT_REKEYED = EVENT_KIND_REKEYED
EVENT_KEY_LIMIT = EVENT_KIND_KEY_LIMIT
EVENT_CONNECTED = EVENT_KIND_CONNECTED
EVENT_EXPORTED = EVENT_KIND_EXPORTED

# Names of the types in engine.pyi, for those who import them at run time.
Event = tuple
ConnectionKeys = tuple

CLOSE_REASONS = (
    "peer", "service", "control", "truncated", "reset", "deadline", "record", "key_update", "limit", "file", "drain", "drain_deadline",
    "resources")
RECORD_LAYER_REASONS = tuple(record_layer_reason(<unsigned char> reason).decode() for reason in range(REASON_COUNT))
RECORD_LAYER_MODES = {"auto": 0, "require": 1, "off": 2}
DEADLINES_MS = {"handshake": 10_000, "header": 60_000, "body": 60_000, "send": 60_000, "idle": 75_000, "close": 5_000}
CONNECTION_BYTES = CONNECTION_STRIDE               # sizeof(Connection) at most, or no Engine can be made
assert len(CLOSE_REASONS) == CLOSE_REASON_COUNT


cdef object keys_tuple(const Secrets* secrets):
    cdef int n = secrets.hash_length
    return (secrets.cipher_suite, (<const char*>secrets.tx)[:n], (<const char*>secrets.rx)[:n], (<const char*>secrets.resumption)[:n])


cdef object event_tuple(Message* m):
    """The tuple of engine.pyi for one event."""
    cdef Secrets secrets
    cdef object keys
    if m.kind == EVENT_KIND_RECORDS:
        return (m.kind, m.connection, m.a, (<const char*>m.data)[:m.length])
    if m.kind == EVENT_KIND_CONTROL_RECORD:
        memcpy(&secrets, m.data, sizeof(secrets))
        keys = keys_tuple(&secrets)
        OPENSSL_cleanse(&secrets, sizeof(secrets))
        return (m.kind, m.connection, m.a, (<const char*>m.data)[sizeof(secrets):m.length], keys)
    if m.kind == EVENT_KIND_INSTALLED:
        if m.a == RECORD_LAYER_NONE:
            return (m.kind, m.connection, "none", "no TLS")
        return (m.kind, m.connection, "kernel" if m.a == RECORD_LAYER_KERNEL else "user", RECORD_LAYER_REASONS[m.b])
    if m.kind == EVENT_KIND_CLOSED:
        return (m.kind, m.connection, CLOSE_REASONS[m.a], m.b)
    if m.kind == EVENT_KIND_ACCEPT_PAUSED:
        return (m.kind, m.connection, m.a)
    if m.kind == EVENT_KIND_CONNECTED:
        return (m.kind, m.connection, m.b, -m.a)
    if m.kind == EVENT_KIND_EXPORTED:
        return (m.kind, m.connection, m.b, m.a)
    if m.kind == EVENT_KIND_DRAINED:
        return (m.kind, m.b)
    if m.kind == EVENT_KIND_REKEYED:
        return (m.kind, m.connection, m.a, m.b)
    if m.kind == EVENT_KIND_KEY_LIMIT:
        memcpy(&secrets, m.data, sizeof(secrets))
        keys = keys_tuple(&secrets)
        OPENSSL_cleanse(&secrets, sizeof(secrets))
        return (m.kind, m.connection, keys)
    return (m.kind, m.connection)                  # END_OF_FILE, UNLISTENED


cdef class Engine:
    """See engine.pyi."""
    cdef Core* core
    cdef dict services
    cdef int cpu
    cdef bint running
    cdef bint ran

    def __cinit__(self):
        cdef void* memory = NULL
        if posix_memalign(&memory, 64, sizeof(Core)) != 0:
            raise MemoryError
        memset(memory, 0, sizeof(Core))
        self.core = <Core*>memory
        self.core.command_fd = -1
        self.core.event_fd = -1

    def __init__(self, *, int cpu=-1, int connections_max=65536, str record_layer="auto",
                 ktls_suites=frozenset((0x1301, 0x1302, 0x1303)), bint ktls_rekey=False, bint ktls_record_size=False, deadlines_ms=None,
                 file_service=None, services=None, int buffers_rest_ms=5_000):
        cdef Core* core = self.core
        cdef int i
        if core.command_fd >= 0:
            raise RuntimeError("Engine: initialised twice")
        if connections_max < 1:
            raise ValueError(f"Engine: connections_max is {connections_max}, must be at least 1")
        self.cpu = cpu
        core.record_layer_mode = RECORD_LAYER_MODES[record_layer]
        for suite in ktls_suites:
            if suite & 0xff00 == 0x1300 and suite & 0xff < 32:
                core.ktls_suites |= <uint32_t>1 << (suite & 31)
        core.ktls_rekey = ktls_rekey
        core.ktls_record_size = ktls_record_size
        core.input_bytes_max = 65536
        core.pool_rest_ns = <uint64_t>buffers_rest_ms * 1_000_000
        self._set_deadlines({**DEADLINES_MS, **(deadlines_ms or {})})
        for i in range(LISTENERS_MAX):
            core.listeners[i].fd = -1
        self.services = {}
        if file_service is not None:
            self._register_files(file_service)
        for index, service in (services or {}).items():
            self._register(index, service)
        if (core_connections_setup(core, <uint32_t>connections_max) < 0 or pool_setup(&core.pool, 1024, 128, 32) < 0
                or queue_setup(&core.commands) < 0 or queue_setup(&core.events) < 0):
            raise MemoryError("Engine: no memory for connections, buffers and queues")
        core.command_fd = eventfd(0, EFD_CLOEXEC)
        core.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
        if core.command_fd < 0 or core.event_fd < 0:
            raise OSError("Engine: no eventfd; raise the limit of open files")

    def __dealloc__(self):
        cdef Core* core = self.core
        if core == NULL:
            return
        if core.command_fd >= 0:
            close(core.command_fd)
        if core.event_fd >= 0:
            close(core.event_fd)
        queue_teardown(&core.commands)
        queue_teardown(&core.events)
        pool_teardown(&core.pool)
        core_connections_teardown(core)
        free(core)
        self.core = NULL

    def _set_deadlines(self, dict deadlines_ms):
        unknown = set(deadlines_ms) - set(DEADLINES_MS)
        if unknown:
            raise ValueError(f"Engine: unknown deadlines {sorted(unknown)}; known are {sorted(DEADLINES_MS)}")
        self.core.deadlines.handshake_ns = deadlines_ms["handshake"] * 1_000_000
        self.core.deadlines.header_ns = deadlines_ms["header"] * 1_000_000
        self.core.deadlines.body_ns = deadlines_ms["body"] * 1_000_000
        self.core.deadlines.send_ns = deadlines_ms["send"] * 1_000_000
        self.core.deadlines.idle_ns = deadlines_ms["idle"] * 1_000_000
        self.core.deadlines.close_ns = deadlines_ms["close"] * 1_000_000

    def _register(self, int index, ServiceObject service not None):
        if not 0 <= index < SERVICES_MAX:
            raise ValueError(f"Engine: service index {index}, must be 0..{SERVICES_MAX - 1}")
        if service.table.on_established == NULL:
            raise TypeError(f"Engine: {type(service).__name__} has no functions")
        self.core.services[index] = &service.table
        self.services[index] = service

    def _register_files(self, FileService service not None):
        self.core.services[0] = &service.service
        self.services[0] = service

    def run(self):
        cdef int result
        cdef sigset_t all_signals, previous
        cdef Core* core = self.core
        if self.ran:
            raise RuntimeError("Engine: run() was called before; an engine runs once")
        self.ran = True
        if self.cpu >= 0:
            os.sched_setaffinity(0, {self.cpu})
        # Signals belong to the control thread: its wait must be the one that they interrupt.
        sigfillset(&all_signals)
        pthread_sigmask(SIG_BLOCK, &all_signals, &previous)
        self.running = True
        with nogil:
            result = loop_setup(core)
            if result == 0:
                result = loop_run(core)
                loop_teardown(core)
        self.running = False
        pthread_sigmask(SIG_SETMASK, &previous, NULL)
        if result < 0:
            raise OSError(-result, f"engine: io_uring: {os.strerror(-result)}; kdaemon doctor tells what is missing")

    def event_fd(self):
        return self.core.event_fd

    def events(self, int maximum=0x7fffffff):
        cdef Message message
        cdef uint64_t count
        cdef int taken = 0
        cdef list events = []
        # The eventfd first: a write that comes between the two would be read away with event_signalled left at 1, and nothing
        # would ever be signalled again.
        read(self.core.event_fd, &count, sizeof(count))
        # Pair: exchange in events_signal. What is published after this exchange is signalled again; what came before is popped below.
        exchange_u32(&self.core.event_signalled, 0)
        while taken < maximum and queue_pop(&self.core.events, &message):
            events.append(event_tuple(&message))
            message_free(&message)
            taken += 1
        return events

    def flush(self):
        cdef uint64_t one = 1
        fence_seq_cst()                            # pair: fence in loop_run; the commands are published before
        if load_relaxed_u32(&self.core.asleep):
            write(self.core.command_fd, &one, sizeof(one))

    cdef int push(self, int32_t kind, uint64_t connection, int32_t a=0, int64_t b=0, bytes data=None) except -1:
        # A command, with a copy of `data`.
        cdef Message message
        message.kind, message.connection, message.a, message.b = kind, connection, a, b
        message.data = NULL
        message.length = 0
        message.secret = 0
        if data:
            message.length = <uint32_t>len(data)
            message.data = <uint8_t*>malloc(message.length)
            if message.data == NULL:
                raise MemoryError
            memcpy(message.data, <const char*>data, message.length)
        return self.push_owned(&message)

    cdef int push_owned(self, Message* message) except -1:
        message.c = 0
        if queue_push(&self.core.commands, message) < 0:
            message_free(message)
            raise MemoryError
        return 0

    def listen(self, int listener, int fd, *, int service=-1, uint32_t site=0, bint limited=False):
        cdef int64_t purpose = LISTEN_LIMITED if limited else LISTEN_TLS
        if service >= 0:
            purpose = <int64_t>service << 32 | site
        self.push(COMMAND_LISTEN, <uint64_t>listener, fd, purpose)

    def adopt(self, int fd, int64_t cookie, *, bint foreign=False):
        self.push(COMMAND_ADOPT, foreign, fd, cookie)

    def install_plain(self, uint64_t conn, *, int service, uint32_t site):
        if not 0 <= service < SERVICES_MAX or self.core.services[service] == NULL:
            raise ValueError(f"Engine.install_plain: there is no service {service}")
        self.push(COMMAND_PLAIN, conn, 0, <int64_t>service << 32 | site)

    def start_tls(self, uint64_t conn, int64_t cookie, *, bint client_role):
        self.push(COMMAND_START_TLS, conn, client_role, cookie)

    def export(self, uint64_t conn, int64_t cookie):
        self.push(COMMAND_EXPORT, conn, 0, cookie)

    def unlisten(self, int listener):
        self.push(COMMAND_UNLISTEN, <uint64_t>listener)

    def receive(self, uint64_t conn):
        self.push(COMMAND_RECEIVE, conn)

    def send(self, uint64_t conn, bytes data not None):
        if data:
            self.push(COMMAND_SEND, conn, 0, 0, data)

    def install(self, uint64_t conn, *, int cipher_suite, bytes tx_key not None, bytes tx_iv not None, uint64_t tx_sequence,
                bytes tx_secret not None, bytes rx_key not None, bytes rx_iv not None, uint64_t rx_sequence, bytes rx_secret not None,
                bytes resumption_secret=b"", bytes leftover=b"", int service=0, int site=0, int record_size_max=16385):
        cdef Message m
        cdef KeyMaterial* material
        cdef uint32_t key_length = suite_key_length(<uint16_t>cipher_suite)
        cdef uint32_t hash_length = suite_hash_length(<uint16_t>cipher_suite)
        if key_length == 0 or len(tx_key) != key_length or len(rx_key) != key_length or len(tx_iv) != 12 or len(rx_iv) != 12:
            raise ValueError(f"Engine.install: cipher suite {cipher_suite:#06x}: keys of {key_length} and IVs of 12 bytes are needed")
        if len(tx_secret) != hash_length or len(rx_secret) != hash_length or len(resumption_secret) not in (0, hash_length):
            raise ValueError(f"Engine.install: cipher suite {cipher_suite:#06x}: secrets of {hash_length} bytes are needed")
        if not 0 <= service < SERVICES_MAX or self.core.services[service] == NULL:
            raise ValueError(f"Engine.install: there is no service {service}")
        if not 64 <= record_size_max <= 16385:
            raise ValueError(f"Engine.install: record_size_max is {record_size_max}, must be 64 to 16385")
        m.kind, m.connection, m.a, m.b = COMMAND_INSTALL, conn, 0, 0
        m.length = <uint32_t>(sizeof(KeyMaterial) + len(leftover))
        m.secret = 1
        material = <KeyMaterial*>calloc(1, m.length)
        if material == NULL:
            raise MemoryError
        m.data = <uint8_t*>material
        memcpy(material.tx_key, <const char*>tx_key, key_length)
        memcpy(material.rx_key, <const char*>rx_key, key_length)
        memcpy(material.tx_iv, <const char*>tx_iv, 12)
        memcpy(material.rx_iv, <const char*>rx_iv, 12)
        material.tx_sequence = tx_sequence
        material.rx_sequence = rx_sequence
        material.secrets.cipher_suite = <uint16_t>cipher_suite
        material.secrets.hash_length = <uint8_t>hash_length
        memcpy(material.secrets.tx, <const char*>tx_secret, hash_length)
        memcpy(material.secrets.rx, <const char*>rx_secret, hash_length)
        memcpy(material.secrets.resumption, <const char*>resumption_secret, len(resumption_secret))
        material.service = <uint32_t>service
        material.site = <uint32_t>site
        material.record_content_max = <uint16_t>(record_size_max - 1)
        material.attached_length = <uint32_t>len(leftover)
        memcpy(material.attached, <const char*>leftover, len(leftover))
        self.push_owned(&m)

    def rekey(self, uint64_t conn, int direction, bytes key not None, bytes iv not None, bytes secret not None, bytes key_update=b""):
        cdef Message m
        cdef KeyMaterial* material
        if direction not in (0, 1) or len(key) > 32 or len(iv) != 12 or len(secret) > 48 or len(key_update) > 16384:
            raise ValueError("Engine.rekey: direction is 0 (rx) or 1 (tx), key at most 32, iv 12, secret at most 48, key_update at most 16384 bytes")
        m.kind, m.connection, m.a, m.b = COMMAND_REKEY, conn, direction, 0
        m.length = <uint32_t>(sizeof(KeyMaterial) + len(key_update))
        m.secret = 1
        material = <KeyMaterial*>calloc(1, m.length)
        if material == NULL:
            raise MemoryError
        m.data = <uint8_t*>material
        if direction == 1:
            memcpy(material.tx_key, <const char*>key, len(key))
            memcpy(material.tx_iv, <const char*>iv, 12)
            memcpy(material.secrets.tx, <const char*>secret, len(secret))
            material.attached_length = <uint32_t>len(key_update)
            memcpy(material.attached, <const char*>key_update, len(key_update))
        else:
            memcpy(material.rx_key, <const char*>key, len(key))
            memcpy(material.rx_iv, <const char*>iv, 12)
            memcpy(material.secrets.rx, <const char*>secret, len(secret))
        self.push_owned(&m)

    def send_control(self, uint64_t conn, int content_type, bytes data not None):
        if len(data) > 16384 or not 20 <= content_type <= 22:
            raise ValueError("Engine.send_control: content_type 20..22, at most 16384 bytes")
        self.push(COMMAND_SEND_CONTROL, conn, content_type, 0, data)

    def close(self, uint64_t conn, bytes data=b""):
        self.push(COMMAND_CLOSE, conn, 0, 0, data)

    def abandon(self, uint64_t conn):
        self.push(COMMAND_CLOSE, conn, 1)

    def abandon_listener(self, int listener):
        self.push(COMMAND_UNLISTEN, <uint64_t>listener, 1)

    def drain(self, int64_t deadline_ms):
        self.push(COMMAND_DRAIN, 0, 0, deadline_ms)

    def stop(self):
        self.push(COMMAND_STOP, 0)
        self.flush()

    def counters(self):
        cdef int i
        cdef Core* core = self.core
        result = {
            "connections": load_relaxed_u64(&core.counters.connections),
            "accepted": load_relaxed_u64(&core.counters.accepted),
            "accept_paused": load_relaxed_u64(&core.counters.accept_paused),
            "refused": load_relaxed_u64(&core.counters.refused),
            "refused_by_limit": load_relaxed_u64(&core.counters.refused_by_limit),
            "bytes_in": load_relaxed_u64(&core.counters.bytes_in),
            "bytes_out": load_relaxed_u64(&core.counters.bytes_out),
            "record_layer_kernel": load_relaxed_u64(&core.counters.record_layer_kernel),
            "record_layer_user": load_relaxed_u64(&core.counters.record_layer_user),
            "record_layer_none": load_relaxed_u64(&core.counters.record_layer_none),
            "exported": load_relaxed_u64(&core.counters.exported),
            "requests": load_relaxed_u64(&core.counters.requests),
            "control_records": load_relaxed_u64(&core.counters.control_records),
            "bulk_receives": load_relaxed_u64(&core.counters.bulk_receives),
            "held_waits": load_relaxed_u64(&core.counters.held_waits),
            "flush_waits": load_relaxed_u64(&core.counters.flush_waits),
            "events": load_relaxed_u64(&core.counters.events),
            "commands": load_relaxed_u64(&core.counters.commands),
            "turns": load_relaxed_u64(&core.counters.turns),
            "wakes": load_relaxed_u64(&core.counters.wakes),
            "signals": load_relaxed_u64(&core.counters.signals),
            "uring_enters": load_relaxed_u64(&core.uring.enters),
            "buffers_in_use": load_relaxed_u64(&core.pool.in_use),
            "buffers_resident": load_relaxed_u64(&core.pool.resident),
            "receive_buffers_resident": load_relaxed_u64(&core.receive_ring.resident),
        }
        for i in range(<int>CLOSE_REASON_COUNT):
            result[f"closed_{CLOSE_REASONS[i]}"] = load_relaxed_u64(&core.counters.closed[i])
        return result
