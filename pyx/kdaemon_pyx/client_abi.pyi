"""Constants of the client ring (client_abi.h) and the messages outside its shared memory."""

from typing import Final

NOP: Final[int]
BARRIER: Final[int]
CANCEL: Final[int]
OPEN: Final[int]
CONNECT: Final[int]
START_TLS: Final[int]
LISTEN: Final[int]
ACCEPT: Final[int]
READ: Final[int]
WRITE: Final[int]
SHUTDOWN: Final[int]
CLOSE: Final[int]
INFO: Final[int]
ADOPT: Final[int]
EXPORT: Final[int]
OPCODE_NAMES: Final[tuple[str, ...]]
LANE_ANY: Final[int]
PARAMETER_INSECURE: Final[int]
PARAMETER_SERVER: Final[int]
PARAMETER_PLAIN: Final[int]
HELLO_SIZE: Final[int]
HELLO_REPLY_SIZE: Final[int]
MAGIC: Final[int]
VERSION_MAJOR: Final[int]
VERSION_MINOR: Final[int]
DESCRIPTOR_MESSAGE_SIZE: Final[int]
RECORD_LAYERS: Final[tuple[str, ...]]
SHUTDOWN_READ: Final[int]
SHUTDOWN_WRITE: Final[int]
DETAIL_ALERT_SENT: Final[int]
DETAIL_ALERT_RECEIVED: Final[int]
DETAIL_TRUNCATED: Final[int]
DETAIL_CERTIFICATE_UNTRUSTED: Final[int]
DETAIL_CERTIFICATE_EXPIRED: Final[int]
DETAIL_CERTIFICATE_NAME: Final[int]
DETAIL_CERTIFICATE_SELF_SIGNED: Final[int]
DETAIL_CERTIFICATE_BAD: Final[int]
DETAIL_NAME_RESOLUTION: Final[int]

def pack_hello(
    *, lane: int = ..., submission_entries: int = 0, completion_entries: int = 0, slot_count: int = 0, arena_size: int = 0,
    version: tuple[int, int] = ...,
) -> bytes: ...
def unpack_hello(data: bytes) -> dict[str, int]: ...
def lane_of_hello(data: bytes) -> int | None:
    """The lane that a hello asks for; None: any, or not a whole hello."""
def pack_hello_reply(*, error: int, version_minor: int = ..., memory_size: int = 0, lane: int = 0, lane_count: int = 1) -> bytes: ...
def unpack_hello_reply(data: bytes) -> dict[str, int]: ...
def pack_info(
    *, tls_version: int, cipher_suite: int, named_group: int, record_layer: int, resumed: bool, port: int, alpn: bytes, reason: str,
    server_name: str, certificate: bytes,
) -> bytes: ...
def unpack_info(data: bytes) -> dict[str, object]: ...
def pack_descriptor_message(opcode: int, user_data: int) -> bytes: ...
def unpack_descriptor_message(data: bytes) -> tuple[int, int]: ...
