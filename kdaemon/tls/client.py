"""The client's handshake (RFC 8446 §2, §A.1), sans I/O.

    ClientHello -> [HelloRetryRequest, ClientHello ->] ServerHello .. Finished ->
    [Certificate, CertificateVerify,] Finished

The ClientHello is ready when the object is made. A client certificate's signature is asked for like a server's.
"""

import hmac
from enum import IntEnum
from typing import ClassVar, Final

from cryptography import x509

from kdaemon.tls.certificates import load_certificate, parse_address, to_ascii, verify_with_certificate
from kdaemon.tls.client_hello import ClientPsk, Grease, make_client_hello, make_extensions, offered_shares
from kdaemon.tls.configuration import ClientConfig, Credential, CredentialRequest, ExternalPsk
from kdaemon.tls.constants import (
    CERTIFICATE_REQUEST_SIZE_MAX,
    CERTIFICATE_SIZE_MAX,
    CERTIFICATE_VERIFY_SIZE_MAX,
    COOKIE_SIZE_MAX,
    ENCRYPTED_EXTENSIONS_SIZE_MAX,
    FINISHED_SIZE_MAX,
    RANDOM_SIZE,
    SERVER_HELLO_SIZE_MAX,
    SESSION_ID_SIZE_MAX,
    ContentType,
    HandshakeType,
)
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.errors import (
    BadFinished,
    IllegalParameter,
    MalformedMessage,
    MissingExtension,
    UnexpectedMessage,
    UnsolicitedExtension,
)
from kdaemon.tls.extensions import (
    ALLOWED_IN_CERTIFICATE_REQUEST,
    ALLOWED_IN_ENCRYPTED_EXTENSIONS,
    ALLOWED_IN_HELLO_RETRY_REQUEST,
    ALLOWED_IN_SERVER_HELLO,
    Extensions,
    parse_application_protocols,
    parse_certificate_authorities,
    parse_certificate_status,
    parse_cookie,
    parse_key_share_entry,
    parse_oid_filters,
    parse_record_size_limit,
    parse_signature_algorithms,
    parse_supported_groups,
    parse_uint16,
    require_empty,
)
from kdaemon.tls.handshake import Established, Expectation, Handshake, Random, TrafficKeys, Transitions
from kdaemon.tls.key_exchange import HybridKeyShare, KeyShare
from kdaemon.tls.key_schedule import (
    SUITES,
    EarlyStage,
    HandshakeStage,
    MasterStage,
    SuiteParameters,
    finished_verify_data,
    traffic_key,
)
from kdaemon.tls.messages import (
    Certificate,
    ServerHello,
    message_hash,
    parse_certificate,
    parse_certificate_request,
    parse_certificate_verify,
    parse_encrypted_extensions,
    parse_finished,
    parse_server_hello,
    serialize_certificate,
    serialize_certificate_verify,
    serialize_finished,
)
from kdaemon.tls.record import CHANGE_CIPHER_SPEC_RECORD
from kdaemon.tls.server_answers import check_answers, check_request, check_server_hello
from kdaemon.tls.session import SessionTicket
from kdaemon.tls.signing import Role, SignRequest, choose_scheme

__all__ = ["ClientConfig", "ClientHandshake", "ClientState"]

_LEGACY_VERSION_OF_FIRST_RECORD: Final = b"\x03\x01"  # RFC 8446 §5.1


class ClientState(IntEnum):
    """What the client waits for."""

    EXPECT_SERVER_HELLO = 0
    EXPECT_SECOND_SERVER_HELLO = 1
    EXPECT_ENCRYPTED_EXTENSIONS = 2
    EXPECT_CERTIFICATE_OR_REQUEST = 3
    EXPECT_CERTIFICATE = 4
    EXPECT_CERTIFICATE_VERIFY = 5
    EXPECT_FINISHED = 6
    COMPLETE = 7


class ClientHandshake(Handshake):
    """One client handshake. See :class:`~kdaemon.tls.handshake.Handshake` for how it is driven. Not thread-safe.

    ``server_name``: host name or IP address, for SNI and for the certificate. ``session``: a ticket or external PSK to
    offer. ``group``: send a share of this group alone, which the server is known to prefer. ``random``: size -> bytes.
    ``now_s``: wall-clock seconds.
    """

    TRANSITIONS: ClassVar[Transitions]

    __slots__ = (
        "_certificate",
        "_client_random",
        "_client_secret",
        "_compatibility_record_due",
        "_config",
        "_credential",
        "_extensions",
        "_grease",
        "_handshake_stage",
        "_hello",
        "_host_name",
        "_master_stage",
        "_psk",
        "_requested",
        "_result",
        "_retry_suite",
        "_retry_transcript",
        "_selected_group",
        "_server_name",
        "_server_secret",
        "_session_id",
        "_shares",
        "_suite",
    )

    _suite: SuiteParameters
    _handshake_stage: HandshakeStage
    _master_stage: MasterStage
    _result: Established
    _certificate: x509.Certificate

    def __init__(
        self,
        config: ClientConfig,
        server_name: str,
        *,
        random: Random,
        now_s: float,
        session: SessionTicket | ExternalPsk | None = None,
        group: int | None = None,
    ) -> None:
        super().__init__(random=random, now_s=now_s, state=ClientState.EXPECT_SERVER_HELLO)
        self._config = config
        self._server_name = server_name
        self._host_name = None if parse_address(server_name) is not None else to_ascii(server_name)
        self._client_random = random(RANDOM_SIZE)
        self._session_id = random(SESSION_ID_SIZE_MAX) if config.compatibility_mode else b""
        self._grease = Grease(random(5)) if config.grease else None
        share_groups = (group,) if group is not None and group in config.groups else config.key_share_groups
        self._shares: dict[int, KeyShare] = {entry: config.generate_key_share(entry) for entry in share_groups}
        self._psk = self._usable_psk(session)
        self._retry_transcript = b""
        self._retry_suite: SuiteParameters | None = None
        self._selected_group = 0
        self._compatibility_record_due = config.compatibility_mode
        self._client_secret = b""
        self._server_secret = b""
        self._requested: CredentialRequest | None = None
        self._credential: Credential | None = None
        self._extensions: Extensions = {}
        self._hello = b""
        self._emit_client_hello(cookie=None)

    def _usable_psk(self, session: SessionTicket | ExternalPsk | None) -> ClientPsk | None:
        if session is None or (isinstance(session, SessionTicket) and not session.usable(self._now_s)):
            return None
        psk = ClientPsk(session, self._now_s)
        return psk if any(SUITES[code].hash is psk.hash for code in self._config.cipher_suites) else None

    # --- ClientHello

    def _emit_client_hello(self, cookie: bytes | None) -> None:
        config = self._config
        shares = offered_shares(config, self._shares, self._grease, selected=bool(self._selected_group))
        self._extensions = make_extensions(config, self._host_name, shares, cookie, self._grease)
        self._hello = make_client_hello(
            config,
            (self._client_random, self._session_id),
            self._extensions,
            self._grease,
            psk=self._psk,
            transcript_before=self._retry_transcript,
        )
        version = b"\x03\x03" if self._retry_transcript else _LEGACY_VERSION_OF_FIRST_RECORD
        self._out.append(self._writer.write(ContentType.HANDSHAKE, self._hello, version))
        self._reader.change_cipher_spec_allowed = True

    def _send_compatibility_record(self) -> None:
        if self._compatibility_record_due:  # RFC 8446 §D.4: once, before the second flight
            self._compatibility_record_due = False
            self._out.append(CHANGE_CIPHER_SPEC_RECORD)

    # --- ServerHello and HelloRetryRequest

    def _handle_server_hello(self, message: bytes) -> None:
        hello = parse_server_hello(message)
        suite = check_server_hello(hello, self._session_id, self._config.cipher_suites)
        retry = hello.is_retry_request()
        self._check_answers(hello.extensions, ALLOWED_IN_HELLO_RETRY_REQUEST if retry else ALLOWED_IN_SERVER_HELLO)
        if retry:
            self._handle_hello_retry_request(message, hello, suite)
            return
        if self._retry_suite is not None and suite is not self._retry_suite:
            raise IllegalParameter("ServerHello has another cipher suite than the HelloRetryRequest")
        psk = self._check_selected_psk(hello, suite)
        key_share = hello.extensions.get(Extension.KEY_SHARE)
        if key_share is None:
            if psk is not None:  # the mode offered is PSK with a key exchange (RFC 8446 §4.2.11)
                raise IllegalParameter("ServerHello selects a PSK without a key exchange, which was not offered")
            raise MissingExtension("ServerHello has no key_share")
        group, server_share = parse_key_share_entry(key_share)
        shared_secret = self._exchange(group, server_share)
        self._start_transcript(suite, self._retry_transcript + self._hello + message)
        early_stage = EarlyStage(suite.hash) if psk is None else psk.early_stage
        self._suite = suite
        self._psk = psk
        self._handshake_stage = early_stage.handshake_stage(shared_secret)
        self._hello = b""
        self._shares = {}
        self._install_handshake_keys()
        result = self._result = Established(suite)
        result.server_name = self._host_name
        result.group = group
        result.retried = self._retry_suite is not None
        if psk is not None:
            result.resumed = psk.external is None
            result.external_psk_identity = None if psk.external is None else psk.external.identity
        self.state = ClientState.EXPECT_ENCRYPTED_EXTENSIONS

    def _check_answers(self, extensions: Extensions, allowed: frozenset[int]) -> None:
        offered = set(self._extensions)
        if self._psk is not None:
            offered.add(Extension.PRE_SHARED_KEY)
        check_answers(extensions, offered, allowed)

    def _handle_hello_retry_request(self, message: bytes, hello: ServerHello, suite: SuiteParameters) -> None:
        if self.state != ClientState.EXPECT_SERVER_HELLO:
            raise UnexpectedMessage("a second HelloRetryRequest")  # RFC 8446 §4.1.4
        key_share = hello.extensions.get(Extension.KEY_SHARE)
        cookie = hello.extensions.get(Extension.COOKIE)
        if cookie is not None and len(parse_cookie(cookie)) > COOKIE_SIZE_MAX:
            raise IllegalParameter("the cookie is longer than a second ClientHello has room for")
        if key_share is not None:
            group = parse_uint16(key_share, "key_share")
            if group not in self._config.groups or group in self._sent_groups():
                raise IllegalParameter("HelloRetryRequest asks for a group that was not offered, or was sent already")
            self._shares = {group: self._config.generate_key_share(group)}
            self._selected_group = group
        elif cookie is None:
            raise IllegalParameter("HelloRetryRequest changes nothing")
        self._start_transcript(suite, self._hello)
        self._retry_transcript = message_hash(self._transcript.digest()) + message
        self._retry_suite = suite
        if self._psk is not None and self._psk.hash is not suite.hash:
            self._psk = None  # RFC 8446 §4.1.4: a PSK that the suite cannot be used with is left out
        self._send_compatibility_record()
        self._emit_client_hello(cookie)
        self.state = ClientState.EXPECT_SECOND_SERVER_HELLO

    def _check_selected_psk(self, hello: ServerHello, suite: SuiteParameters) -> ClientPsk | None:
        selected = hello.extensions.get(Extension.PRE_SHARED_KEY)
        if selected is None:
            return None
        if parse_uint16(selected, "pre_shared_key") != 0:
            raise IllegalParameter("ServerHello selects a PSK that was not offered")
        if self._psk is None or self._psk.hash is not suite.hash:
            raise IllegalParameter("ServerHello selects a PSK that does not fit its cipher suite")
        return self._psk

    def _exchange(self, group: int, server_share: bytes) -> bytes:
        share = self._shares.get(group)
        if share is None:
            for hybrid in self._shares.values():
                if (
                    isinstance(hybrid, HybridKeyShare)
                    and hybrid.classical.group == group
                    and group in self._config.groups
                ):
                    share = hybrid.classical
        if share is None or (self._selected_group and group != self._selected_group):
            raise IllegalParameter("ServerHello has a share of a group that none was sent of")
        return share.exchange(server_share)

    def _sent_groups(self) -> dict[int, bytes]:
        return offered_shares(self._config, self._shares, None, selected=False)

    def _install_handshake_keys(self) -> None:
        suite, transcript_hash = self._suite, self._transcript.digest()
        self._client_secret = self._handshake_stage.client_traffic_secret(transcript_hash)
        self._server_secret = self._handshake_stage.server_traffic_secret(transcript_hash)
        key_log = self._config.key_log
        self._log_secret(key_log, "CLIENT_HANDSHAKE_TRAFFIC_SECRET", self._client_random, self._client_secret)
        self._log_secret(key_log, "SERVER_HANDSHAKE_TRAFFIC_SECRET", self._client_random, self._server_secret)
        self._reader.set_key(suite, *traffic_key(suite, self._server_secret))
        # Whatever is sent from here on, an alert too, is protected; the compatibility record goes before it.
        self._send_compatibility_record()
        self._writer.set_key(suite, *traffic_key(suite, self._client_secret))

    # --- the server's flight

    def _handle_encrypted_extensions(self, message: bytes) -> None:
        extensions = parse_encrypted_extensions(message)
        result, config = self._result, self._config
        self._check_answers(extensions, ALLOWED_IN_ENCRYPTED_EXTENSIONS)
        alpn = extensions.get(Extension.APPLICATION_LAYER_PROTOCOL_NEGOTIATION)
        if alpn is not None:
            protocols = parse_application_protocols(alpn)
            if len(protocols) != 1 or protocols[0] not in config.alpn:
                raise IllegalParameter("the server selects an application protocol that was not offered")
            result.alpn = protocols[0]
        if Extension.SERVER_NAME in extensions:
            require_empty(extensions[Extension.SERVER_NAME], "server_name")
        if Extension.SUPPORTED_GROUPS in extensions:
            result.peer_groups = parse_supported_groups(extensions[Extension.SUPPORTED_GROUPS])
        limit = extensions.get(Extension.RECORD_SIZE_LIMIT)
        if limit is not None and config.record_size_limit is not None:
            self._writer.record_size_max = parse_record_size_limit(limit)
            self._reader.limit(config.record_size_limit)
        self._transcript.update(message)
        if self._psk is not None:
            self.state = ClientState.EXPECT_FINISHED
        else:
            self.state = ClientState.EXPECT_CERTIFICATE_OR_REQUEST

    def _handle_certificate_request(self, message: bytes) -> None:
        request = parse_certificate_request(message)
        if request.context:
            raise IllegalParameter("a CertificateRequest in the handshake has a context")  # RFC 8446 §4.3.2
        check_request(request.extensions, ALLOWED_IN_CERTIFICATE_REQUEST)
        algorithms = request.extensions.get(Extension.SIGNATURE_ALGORITHMS)
        if algorithms is None:
            raise MissingExtension("CertificateRequest has no signature_algorithms")
        authorities = request.extensions.get(Extension.CERTIFICATE_AUTHORITIES)
        filters = request.extensions.get(Extension.OID_FILTERS)
        if Extension.STATUS_REQUEST in request.extensions:
            require_empty(request.extensions[Extension.STATUS_REQUEST], "status_request")
        if Extension.SIGNATURE_ALGORITHMS_CERT in request.extensions:
            parse_signature_algorithms(request.extensions[Extension.SIGNATURE_ALGORITHMS_CERT])
        self._requested = CredentialRequest(
            parse_signature_algorithms(algorithms),
            () if authorities is None else parse_certificate_authorities(authorities),
            {} if filters is None else parse_oid_filters(filters),
        )
        self._transcript.update(message)
        self.state = ClientState.EXPECT_CERTIFICATE

    def _handle_certificate(self, message: bytes) -> None:
        certificate = parse_certificate(message)
        if certificate.context:
            raise IllegalParameter("the server's Certificate has a context")
        if not certificate.entries:
            raise MalformedMessage("the server's Certificate is empty")  # RFC 8446 §4.4.2.4
        for index, entry in enumerate(certificate.entries):
            for extension_type, data in entry.extensions.items():
                if extension_type != Extension.STATUS_REQUEST or not self._config.request_ocsp:
                    raise UnsolicitedExtension("a certificate comes with an extension that was not requested")
                response = parse_certificate_status(data)
                if index == 0:
                    self._result.ocsp_response = response
        chain_der = tuple(entry.certificate_der for entry in certificate.entries)
        self._certificate = load_certificate(chain_der[0])
        if self._config.verify is not None:
            self._config.verify(chain_der, self._server_name, self._now_s)
        self._result.peer_chain_der = chain_der
        self._transcript.update(message)
        self.state = ClientState.EXPECT_CERTIFICATE_VERIFY

    def _handle_certificate_verify(self, message: bytes) -> None:
        scheme, signature = parse_certificate_verify(message)
        if scheme not in self._config.signature_schemes:
            raise IllegalParameter(f"CertificateVerify uses the scheme {scheme:#06x}, which was not offered")
        verify_with_certificate(self._certificate, scheme, Role.SERVER, self._transcript.digest(), signature)
        del self._certificate
        self._result.signature_scheme = scheme
        self._transcript.update(message)
        self.state = ClientState.EXPECT_FINISHED

    def _handle_finished(self, message: bytes) -> None:
        suite, transcript = self._suite, self._transcript
        expected = finished_verify_data(suite.hash, self._server_secret, transcript.digest())
        if not hmac.compare_digest(parse_finished(message, suite.hash.size), expected):
            raise BadFinished("the server's Finished does not match")
        transcript.update(message)
        transcript_hash = transcript.digest()
        master_stage = self._master_stage = self._handshake_stage.master_stage()
        result, key_log = self._result, self._config.key_log
        result.tx = TrafficKeys(suite, master_stage.client_traffic_secret(transcript_hash))
        result.rx = TrafficKeys(suite, master_stage.server_traffic_secret(transcript_hash))
        result.exporter_secret = master_stage.exporter_secret(transcript_hash)
        self._log_secret(key_log, "CLIENT_TRAFFIC_SECRET_0", self._client_random, result.tx.secret)
        self._log_secret(key_log, "SERVER_TRAFFIC_SECRET_0", self._client_random, result.rx.secret)
        self._log_secret(key_log, "EXPORTER_SECRET", self._client_random, result.exporter_secret)
        if self._requested is None:
            self._emit_finished(b"")
        else:
            self._answer_certificate_request(self._requested)

    # --- the client's second flight

    def _answer_certificate_request(self, requested: CredentialRequest) -> None:
        provider = self._config.credential
        credential = None if provider is None else provider(requested)
        scheme = None if credential is None else choose_scheme(credential.schemes, requested.signature_algorithms)
        if credential is None or scheme is None:
            message = serialize_certificate(Certificate(b"", ()))
            self._transcript.update(message)
            self._emit_finished(message)
            return
        self._credential = credential
        self._transcript.update(credential.certificate_message(False))
        self._sign_request = SignRequest(credential.key_id, scheme, Role.CLIENT, self._transcript.digest())

    def _continue_with_signature(self, request: SignRequest, signature: bytes) -> None:
        assert self._credential is not None
        certificate_verify = serialize_certificate_verify(request.scheme, signature)
        self._transcript.update(certificate_verify)
        self._emit_finished(self._credential.certificate_message(False) + certificate_verify)
        self._process()

    def _emit_finished(self, flight: bytes) -> None:
        suite, transcript, result = self._suite, self._transcript, self._result
        finished = serialize_finished(finished_verify_data(suite.hash, self._client_secret, transcript.digest()))
        transcript.update(finished)
        self._send_record(ContentType.HANDSHAKE, flight + finished)
        result.resumption_secret = self._master_stage.resumption_secret(transcript.digest())
        result.record_size_max = self._writer.record_size_max
        self._writer.set_key(suite, result.tx.key, result.tx.iv)
        self._established = result
        self._transcript = None
        self.state = ClientState.COMPLETE


ClientHandshake.TRANSITIONS = {
    ClientState.EXPECT_SERVER_HELLO: {
        HandshakeType.SERVER_HELLO: Expectation(ClientHandshake._handle_server_hello, SERVER_HELLO_SIZE_MAX, True),
    },
    ClientState.EXPECT_SECOND_SERVER_HELLO: {
        HandshakeType.SERVER_HELLO: Expectation(ClientHandshake._handle_server_hello, SERVER_HELLO_SIZE_MAX, True),
    },
    ClientState.EXPECT_ENCRYPTED_EXTENSIONS: {
        HandshakeType.ENCRYPTED_EXTENSIONS: Expectation(
            ClientHandshake._handle_encrypted_extensions, ENCRYPTED_EXTENSIONS_SIZE_MAX, False
        ),
    },
    ClientState.EXPECT_CERTIFICATE_OR_REQUEST: {
        HandshakeType.CERTIFICATE_REQUEST: Expectation(
            ClientHandshake._handle_certificate_request, CERTIFICATE_REQUEST_SIZE_MAX, False
        ),
        HandshakeType.CERTIFICATE: Expectation(ClientHandshake._handle_certificate, CERTIFICATE_SIZE_MAX, False),
    },
    ClientState.EXPECT_CERTIFICATE: {
        HandshakeType.CERTIFICATE: Expectation(ClientHandshake._handle_certificate, CERTIFICATE_SIZE_MAX, False),
    },
    ClientState.EXPECT_CERTIFICATE_VERIFY: {
        HandshakeType.CERTIFICATE_VERIFY: Expectation(
            ClientHandshake._handle_certificate_verify, CERTIFICATE_VERIFY_SIZE_MAX, False
        ),
    },
    ClientState.EXPECT_FINISHED: {
        HandshakeType.FINISHED: Expectation(ClientHandshake._handle_finished, FINISHED_SIZE_MAX, True),
    },
    ClientState.COMPLETE: {},
}
