"""The client ring's constants and the few messages outside the shared memory, for Python on either side."""

from libc.string cimport memcpy, memset

NOP = CLIENT_NOP
BARRIER = CLIENT_BARRIER
CANCEL = CLIENT_CANCEL
OPEN = CLIENT_OPEN
CONNECT = CLIENT_CONNECT
START_TLS = CLIENT_START_TLS
LISTEN = CLIENT_LISTEN
ACCEPT = CLIENT_ACCEPT
READ = CLIENT_READ
WRITE = CLIENT_WRITE
SHUTDOWN = CLIENT_SHUTDOWN
CLOSE = CLIENT_CLOSE
INFO = CLIENT_INFO
ADOPT = CLIENT_ADOPT
EXPORT = CLIENT_EXPORT
LANE_ANY = <uint32_t> CLIENT_LANE_ANY
PARAMETER_INSECURE = CLIENT_PARAMETER_INSECURE
PARAMETER_SERVER = CLIENT_PARAMETER_SERVER
PARAMETER_PLAIN = CLIENT_PARAMETER_PLAIN
HELLO_SIZE = sizeof(client_hello)
HELLO_REPLY_SIZE = sizeof(client_hello_reply)
MAGIC = CLIENT_MAGIC
VERSION_MAJOR = CLIENT_VERSION_MAJOR
VERSION_MINOR = CLIENT_VERSION_MINOR
DESCRIPTOR_MESSAGE_SIZE = sizeof(client_descriptor_message)
RECORD_LAYERS = ("none", "kernel", "user")

DETAIL_ALERT_SENT = CLIENT_DETAIL_ALERT_SENT
DETAIL_ALERT_RECEIVED = CLIENT_DETAIL_ALERT_RECEIVED
DETAIL_TRUNCATED = CLIENT_DETAIL_TRUNCATED
DETAIL_CERTIFICATE_UNTRUSTED = CLIENT_DETAIL_CERTIFICATE_UNTRUSTED
DETAIL_CERTIFICATE_EXPIRED = CLIENT_DETAIL_CERTIFICATE_EXPIRED
DETAIL_CERTIFICATE_NAME = CLIENT_DETAIL_CERTIFICATE_NAME
DETAIL_CERTIFICATE_SELF_SIGNED = CLIENT_DETAIL_CERTIFICATE_SELF_SIGNED
DETAIL_CERTIFICATE_BAD = CLIENT_DETAIL_CERTIFICATE_BAD
DETAIL_NAME_RESOLUTION = CLIENT_DETAIL_NAME_RESOLUTION
SHUTDOWN_READ = CLIENT_SHUTDOWN_READ
SHUTDOWN_WRITE = CLIENT_SHUTDOWN_WRITE

OPCODE_NAMES = (
    "NOP", "BARRIER", "CANCEL", "OPEN", "CONNECT", "START_TLS", "LISTEN", "ACCEPT", "READ", "WRITE", "SHUTDOWN", "CLOSE", "INFO",
    "ADOPT", "EXPORT",
)


def pack_hello(*, lane: int = LANE_ANY, submission_entries: int = 0, completion_entries: int = 0, slot_count: int = 0,
               arena_size: int = 0, version: tuple[int, int] = (CLIENT_VERSION_MAJOR, CLIENT_VERSION_MINOR)) -> bytes:
    """``struct client_hello``; 0 asks for the daemon's default."""
    cdef client_hello hello
    memset(&hello, 0, sizeof(hello))
    hello.magic = CLIENT_MAGIC
    hello.version_major = version[0]
    hello.version_minor = version[1]
    hello.size = sizeof(hello)
    hello.lane = lane
    hello.submission_entries = submission_entries
    hello.completion_entries = completion_entries
    hello.slot_count = slot_count
    hello.arena_size = arena_size
    return (<char*> &hello)[:sizeof(hello)]


def unpack_hello(data: bytes) -> dict[str, int]:
    """Fields of a ``struct client_hello``; of another major version only its own number means something. Raises ValueError for what is none."""
    cdef client_hello hello
    cdef bint known
    if len(data) != sizeof(hello):
        raise ValueError(f"a hello has {sizeof(hello)} bytes, not {len(data)}")
    memcpy(&hello, <const char*> data, sizeof(hello))
    known = hello.version_major == CLIENT_VERSION_MAJOR
    if hello.magic != CLIENT_MAGIC or known and (
            hello.size != sizeof(hello) or hello.flags or hello.reserved[0] or hello.reserved[1] or hello.reserved[2]):
        raise ValueError("not a hello of this protocol")
    return {
        "version_major": hello.version_major, "version_minor": hello.version_minor, "lane": hello.lane,
        "submission_entries": hello.submission_entries, "completion_entries": hello.completion_entries,
        "slot_count": hello.slot_count, "arena_size": hello.arena_size,
    }


def lane_of_hello(data: bytes) -> int | None:
    """The lane that a hello, or the beginning of one, asks for; None: any."""
    cdef client_hello hello
    if len(data) != sizeof(hello):
        return None
    memcpy(&hello, <const char*> data, sizeof(hello))
    return None if hello.lane == CLIENT_LANE_ANY else hello.lane


def pack_hello_reply(*, error: int, version_minor: int = CLIENT_VERSION_MINOR, memory_size: int = 0, lane: int = 0,
                     lane_count: int = 1) -> bytes:
    """``struct client_hello_reply``; error is 0 or a negative errno."""
    cdef client_hello_reply reply
    memset(&reply, 0, sizeof(reply))
    reply.magic = CLIENT_MAGIC
    reply.version_major = CLIENT_VERSION_MAJOR
    reply.version_minor = version_minor
    reply.size = sizeof(reply)
    reply.error = error
    reply.memory_size = memory_size
    reply.lane = lane
    reply.lane_count = lane_count
    return (<char*> &reply)[:sizeof(reply)]


def unpack_hello_reply(data: bytes) -> dict[str, int]:
    """Fields of a ``struct client_hello_reply``. Raises ValueError for what is none."""
    cdef client_hello_reply reply
    if len(data) != sizeof(reply):
        raise ValueError(f"a hello reply has {sizeof(reply)} bytes, not {len(data)}")
    memcpy(&reply, <const char*> data, sizeof(reply))
    if reply.magic != CLIENT_MAGIC:
        raise ValueError("not a hello reply of this protocol")
    return {"version_major": reply.version_major, "version_minor": reply.version_minor, "error": reply.error,
            "memory_size": reply.memory_size, "lane": reply.lane, "lane_count": reply.lane_count}


def unpack_info(data: bytes) -> dict[str, object]:
    """Fields of what INFO answered."""
    cdef client_info info
    memset(&info, 0, sizeof(info))
    memcpy(&info, <const char*> data, min(len(data), sizeof(info)))
    return {
        "tls_version": info.tls_version, "cipher_suite": info.cipher_suite, "named_group": info.named_group,
        "record_layer": info.record_layer, "resumed": bool(info.resumed), "port": info.port,
        "alpn": (<char*> info.alpn)[:info.alpn_length], "reason": (<char*> info.reason)[:info.reason_length].decode(),
        "server_name": (<char*> info.server_name)[:info.server_name_length].decode(),
        "certificate": data[sizeof(info):] if len(data) - sizeof(info) == info.certificate_length else b"",
        "certificate_length": info.certificate_length,
        "peer_address": (<char*> info.peer_address)[:sizeof(info.peer_address)], "peer_port": info.peer_port,
        "local_address": (<char*> info.local_address)[:sizeof(info.local_address)], "local_port": info.local_port,
    }


def pack_info(
    *, tls_version: int, cipher_suite: int, named_group: int, record_layer: int, resumed: bool, port: int, alpn: bytes, reason: str,
    server_name: str, certificate: bytes,
) -> bytes:
    """``struct client_info`` with the certificate (DER, may be empty) behind it; texts are cut to their fields."""
    cdef client_info info
    cdef bytes reason_bytes = reason.encode()[:sizeof(info.reason)]
    cdef bytes name_bytes = server_name.encode()[:sizeof(info.server_name)]
    alpn = alpn[:sizeof(info.alpn)]
    memset(&info, 0, sizeof(info))
    info.tls_version = tls_version
    info.cipher_suite = cipher_suite
    info.named_group = named_group
    info.record_layer = record_layer
    info.resumed = resumed
    info.port = port
    info.alpn_length = len(alpn)
    info.reason_length = len(reason_bytes)
    info.server_name_length = len(name_bytes)
    info.certificate_length = len(certificate)
    memcpy(info.alpn, <const char*> alpn, len(alpn))
    memcpy(info.reason, <const char*> reason_bytes, len(reason_bytes))
    memcpy(info.server_name, <const char*> name_bytes, len(name_bytes))
    return (<char*> &info)[:sizeof(info)] + certificate


cdef int fill_parameters(client_parameters* shared, dict values) except -1:
    cdef client_parameters parameters
    cdef bytes text
    memset(&parameters, 0, sizeof(parameters))
    parameters.flags = values.get("flags", 0)
    parameters.port = values.get("port", 0)
    parameters.backlog = values.get("backlog", 0)
    text = bounded(values, "host", sizeof(parameters.host))
    parameters.host_length = <unsigned short> len(text)
    memcpy(parameters.host, <const char*> text, len(text))
    text = bounded(values, "server_name", sizeof(parameters.server_name))
    parameters.server_name_length = <unsigned short> len(text)
    memcpy(parameters.server_name, <const char*> text, len(text))
    text = bounded(values, "alpn", sizeof(parameters.alpn))
    parameters.alpn_length = <unsigned short> len(text)
    memcpy(parameters.alpn, <const char*> text, len(text))
    text = bounded(values, "certificate", sizeof(parameters.certificate))
    parameters.certificate_length = <unsigned short> len(text)
    memcpy(parameters.certificate, <const char*> text, len(text))
    shared[0] = parameters
    return 0


cdef bytes bounded(dict values, str name, size_t size):
    cdef bytes text = values.get(name, b"")
    if len(text) > size:
        raise ValueError(f"{name} has {len(text)} bytes, at most {size} are possible")
    return text


def pack_descriptor_message(opcode: int, user_data: int) -> bytes:
    """``struct client_descriptor_message``: what accompanies a socket on the attach socket."""
    cdef client_descriptor_message message
    message.magic = CLIENT_MAGIC
    message.opcode = opcode
    message.user_data = user_data
    return (<char*> &message)[:sizeof(message)]


def unpack_descriptor_message(data: bytes) -> tuple[int, int]:
    """(opcode, user_data). Raises ValueError for what is none."""
    cdef client_descriptor_message message
    if len(data) != sizeof(message):
        raise ValueError("not a descriptor message")
    memcpy(&message, <const char*> data, sizeof(message))
    if message.magic != CLIENT_MAGIC:
        raise ValueError("not a descriptor message")
    return message.opcode, message.user_data
