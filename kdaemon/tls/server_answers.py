"""What a client checks in a server's answers (RFC 8446 §4.1.3, §4.1.4, §4.2): pure functions over parsed messages."""

from collections.abc import Set

from kdaemon.tls.constants import (
    DOWNGRADE_SENTINELS,
    EXTENSION_NAMES,
    VERSION_TLS_1_2,
    VERSION_TLS_1_3,
)
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.errors import IllegalParameter, NoCommonVersion, UnsolicitedExtension
from kdaemon.tls.extensions import Extensions, parse_uint16
from kdaemon.tls.key_schedule import SUITES, SuiteParameters
from kdaemon.tls.messages import ServerHello


def check_server_hello(hello: ServerHello, session_id: bytes, cipher_suites: tuple[int, ...]) -> SuiteParameters:
    """The fields of a ServerHello or HelloRetryRequest against what was offered; gives the selected suite."""
    version = hello.extensions.get(Extension.SUPPORTED_VERSIONS)
    if version is None:
        if hello.random[-8:] in DOWNGRADE_SENTINELS:
            raise IllegalParameter("the server speaks TLS 1.3 but somebody made it answer with less")
        raise NoCommonVersion("the server does not speak TLS 1.3")
    if parse_uint16(version, "supported_versions") != VERSION_TLS_1_3:
        raise IllegalParameter("ServerHello selects a version that was not offered")
    if hello.legacy_version != VERSION_TLS_1_2:
        raise NoCommonVersion("ServerHello has a legacy_version other than TLS 1.2")  # RFC 9846 §4.2.3
    if hello.session_id != session_id:
        raise IllegalParameter("ServerHello does not echo legacy_session_id")
    if hello.compression_method:
        raise IllegalParameter("ServerHello selects compression")
    if hello.cipher_suite not in cipher_suites:
        raise IllegalParameter("ServerHello selects a cipher suite that was not offered")
    return SUITES[hello.cipher_suite]


def check_answers(extensions: Extensions, offered: Set[int], allowed: Set[int]) -> None:
    """An extension only in answer to one that was sent (the cookie excepted), and only in its own message."""
    for extension_type in extensions:
        was_offered = extension_type in offered or extension_type == Extension.COOKIE
        if was_offered and extension_type in EXTENSION_NAMES and extension_type not in allowed:
            raise IllegalParameter(f"extension {EXTENSION_NAMES[extension_type]} does not belong in this message")
        if not was_offered or extension_type not in allowed:
            raise UnsolicitedExtension(f"the server answers extension {extension_type}, which was not sent")


def check_request(extensions: Extensions, allowed: Set[int]) -> None:
    """Extensions that ask, as in CertificateRequest: unknown ones are ignored, misplaced ones are not."""
    for extension_type in extensions:
        if extension_type in EXTENSION_NAMES and extension_type not in allowed:
            raise IllegalParameter(f"extension {EXTENSION_NAMES[extension_type]} does not belong in this message")
