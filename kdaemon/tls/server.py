"""The server's handshake (RFC 8446 §2, §A.2), sans I/O.

    ClientHello -> [HelloRetryRequest, ClientHello ->] ServerHello .. Finished -> [Certificate, CertificateVerify,]
    Finished -> complete

The whole flight is made when the signature is there, so that it leaves in one send. While a signature is awaited,
received bytes wait unread. Tickets are sealed as records right behind the client's Finished, and
``established.tx.sequence`` counts them.
"""

import hmac
from enum import IntEnum
from functools import lru_cache
from typing import ClassVar, Final

from cryptography import x509

from kdaemon.tls.certificates import load_certificate, verify_with_certificate
from kdaemon.tls.configuration import ClientAuthentication, Credential, ExternalPsk, ServerConfig
from kdaemon.tls.constants import (
    CERTIFICATE_SIZE_MAX,
    CERTIFICATE_VERIFY_SIZE_MAX,
    CLIENT_HELLO_SIZE_MAX,
    FINISHED_SIZE_MAX,
    HELLO_RETRY_REQUEST_RANDOM,
    RANDOM_SIZE,
    TICKET_LIFETIME_MAX_S,
    VERSION_TLS_1_3,
    ContentType,
    HandshakeType,
    PskKeyExchangeMode,
)
from kdaemon.tls.constants import ExtensionType as Extension
from kdaemon.tls.errors import (
    BadFinished,
    CertificateRequired,
    IllegalParameter,
    MissingExtension,
    NoCommonSignatureScheme,
    NoCredential,
    UnknownPskIdentity,
    UnsolicitedExtension,
)
from kdaemon.tls.extensions import (
    Extensions,
    serialize_application_protocols,
    serialize_certificate_authorities,
    serialize_key_share_entry,
    serialize_record_size_limit,
    serialize_signature_algorithms,
    serialize_supported_groups,
)
from kdaemon.tls.handshake import Established, Expectation, Handshake, Random, TrafficKeys, Transitions
from kdaemon.tls.key_exchange import answer_key_share
from kdaemon.tls.key_schedule import (
    SUITES,
    EarlyStage,
    HandshakeStage,
    MasterStage,
    SuiteParameters,
    finished_verify_data,
    ticket_psk,
    traffic_key,
)
from kdaemon.tls.messages import (
    CertificateRequest,
    ClientHello,
    NewSessionTicket,
    message_hash,
    parse_certificate,
    parse_certificate_verify,
    parse_finished,
    serialize_certificate_request,
    serialize_certificate_verify,
    serialize_encrypted_extensions,
    serialize_finished,
    serialize_new_session_ticket,
    serialize_server_hello,
)
from kdaemon.tls.negotiation import (
    ClientOffer,
    check_second_client_hello,
    choose_application_protocol,
    choose_cipher_suite,
    choose_group,
    parse_client_offer,
)
from kdaemon.tls.psk import PskChoice, choose_psk, verify_binder
from kdaemon.tls.record import CHANGE_CIPHER_SPEC_RECORD, EarlyDataSkipping
from kdaemon.tls.signing import CERTIFICATE_SCHEMES, HANDSHAKE_SCHEMES, PeerSchemes, Role, SignRequest, choose_scheme
from kdaemon.tls.tickets import CLIENT_CERTIFICATE_SIZE_MAX, TICKET_NONCE_SIZE, TicketContents, TicketKeys

__all__ = ["ClientAuthentication", "Credential", "ExternalPsk", "ServerConfig", "ServerHandshake", "ServerState"]

_SUPPORTED_VERSION: Final = VERSION_TLS_1_3.to_bytes(2, "big")


@lru_cache(maxsize=64)  # a handful of answers serves all clients
def _encrypted_extensions(
    groups: tuple[int, ...], record_size_limit: int | None, named: bool, alpn: bytes | None
) -> bytes:
    extensions: Extensions = {}
    if groups:
        extensions[Extension.SUPPORTED_GROUPS] = serialize_supported_groups(groups)
    if record_size_limit is not None:
        extensions[Extension.RECORD_SIZE_LIMIT] = serialize_record_size_limit(record_size_limit)
    if named:
        extensions[Extension.SERVER_NAME] = b""
    if alpn is not None:
        extensions[Extension.APPLICATION_LAYER_PROTOCOL_NEGOTIATION] = serialize_application_protocols((alpn,))
    return serialize_encrypted_extensions(extensions)


class ServerState(IntEnum):
    """What the server waits for."""

    EXPECT_CLIENT_HELLO = 0
    EXPECT_SECOND_CLIENT_HELLO = 1
    EXPECT_CERTIFICATE = 2
    EXPECT_CERTIFICATE_VERIFY = 3
    EXPECT_FINISHED = 4
    COMPLETE = 5


class ServerHandshake(Handshake):
    """One server handshake. See :class:`~kdaemon.tls.handshake.Handshake` for how it is driven. Not thread-safe.

    ``random``: size -> that many random bytes. ``now_s``: wall-clock time, seconds since the epoch.
    """

    TRANSITIONS: ClassVar[Transitions]

    __slots__ = (
        "_client_auth",
        "_client_context",
        "_client_random",
        "_client_resumes",
        "_client_secret",
        "_config",
        "_first_hello",
        "_flight",
        "_handshake_stage",
        "_master_stage",
        "_offer",
        "_peer_key",
        "_result",
        "_retry_group",
        "_retry_transcript",
        "_server_secret",
        "_session_ends_at_ms",
        "_suite",
    )

    _suite: SuiteParameters
    _offer: ClientOffer
    _handshake_stage: HandshakeStage
    _master_stage: MasterStage
    _result: Established

    def __init__(self, config: ServerConfig, *, random: Random, now_s: float) -> None:
        super().__init__(random=random, now_s=now_s, state=ServerState.EXPECT_CLIENT_HELLO)
        self._config = config
        self._first_hello: ClientHello | None = None
        self._retry_group = 0
        self._retry_transcript = b""
        self._flight = b""
        self._client_auth: ClientAuthentication | None = None
        self._client_context = b""
        self._session_ends_at_ms = int((now_s + TICKET_LIFETIME_MAX_S) * 1000)
        self._client_random = b""
        self._client_resumes = False
        self._client_secret = b""
        self._server_secret = b""
        self._peer_key: x509.Certificate | None = None

    # --- ClientHello

    def _handle_client_hello(self, message: bytes) -> None:
        offer = parse_client_offer(message)
        config = self._config
        suite = SUITES[choose_cipher_suite(config.cipher_suites, offer.hello.cipher_suites)]
        psk = choose_psk(config, offer, suite, self._now_s)
        if psk is not None:
            suite = psk.suite
        self._reader.change_cipher_spec_allowed = True
        group, share = choose_group(config.groups, offer)
        if share is None:
            self._emit_hello_retry_request(offer, suite, group)
        else:
            self._answer(offer, suite, psk, group, share)

    def _emit_hello_retry_request(self, offer: ClientOffer, suite: SuiteParameters, group: int) -> None:
        retry_request = serialize_server_hello(
            HELLO_RETRY_REQUEST_RANDOM,
            offer.hello.session_id,
            suite.code,
            {Extension.KEY_SHARE: group.to_bytes(2, "big"), Extension.SUPPORTED_VERSIONS: _SUPPORTED_VERSION},
        )
        self._start_transcript(suite, offer.message)
        self._retry_transcript = message_hash(self._transcript.digest()) + retry_request
        self._send_record(ContentType.HANDSHAKE, retry_request)
        self._send_compatibility_record(offer.hello)
        if offer.early_data:
            self._reader.early_data_skipping = EarlyDataSkipping.APPLICATION_DATA
        self._first_hello = offer.hello
        self._retry_group = group
        self._suite = suite
        self.state = ServerState.EXPECT_SECOND_CLIENT_HELLO

    def _handle_second_client_hello(self, message: bytes) -> None:
        offer = parse_client_offer(message)
        first, self._first_hello = self._first_hello, None
        assert first is not None
        share = check_second_client_hello(first, offer, self._retry_group)
        # The suite of the HelloRetryRequest stands (RFC 8446 §4.1.4); a PSK of another hash cannot be used any more.
        psk = choose_psk(self._config, offer, self._suite, self._now_s, suite_fixed=True)
        self._answer(offer, self._suite, psk, self._retry_group, share)

    def _send_compatibility_record(self, hello: ClientHello) -> None:
        # RFC 8446 §D.4: behind the first message of a server whose client sent a session id.
        if hello.session_id:
            self._out.append(CHANGE_CIPHER_SPEC_RECORD)

    # --- ServerHello and the rest of the flight

    def _answer(
        self,
        offer: ClientOffer,
        suite: SuiteParameters,
        psk: PskChoice | None,
        group: int,
        share: bytes,
    ) -> None:
        config = self._config
        credential: Credential | None = None
        scheme = 0
        if psk is not None:
            verify_binder(psk, offer, self._retry_transcript)
        elif config.psk_required:
            raise UnknownPskIdentity("no known PSK is offered")
        else:
            credential, scheme = self._choose_credential(offer)
        alpn = choose_application_protocol(config.alpn, offer.application_protocols)
        server_share, shared_secret = answer_key_share(group, share, config.generate_key_share)
        early_stage = EarlyStage(suite.hash) if psk is None else psk.early_stage

        extensions: Extensions = {}
        if psk is not None:
            extensions[Extension.PRE_SHARED_KEY] = psk.index.to_bytes(2, "big")
        extensions[Extension.KEY_SHARE] = serialize_key_share_entry(group, server_share)
        extensions[Extension.SUPPORTED_VERSIONS] = _SUPPORTED_VERSION
        server_hello = serialize_server_hello(self._random(RANDOM_SIZE), offer.hello.session_id, suite.code, extensions)
        self._start_transcript(suite, self._retry_transcript + offer.message + server_hello)
        self._send_record(ContentType.HANDSHAKE, server_hello)
        if not self._retry_transcript:
            self._send_compatibility_record(offer.hello)

        self._suite = suite
        self._offer = offer
        self._client_random = offer.hello.random
        self._handshake_stage = early_stage.handshake_stage(shared_secret)
        self._install_handshake_keys()

        result = self._result = Established(suite)
        result.alpn = alpn
        result.server_name = offer.server_name
        result.group = group
        result.signature_scheme = scheme
        result.retried = bool(self._retry_transcript)
        if psk is not None:
            result.resumed = psk.ticket is not None
            result.external_psk_identity = psk.external_identity
            if psk.ticket is not None:
                self._session_ends_at_ms = psk.ticket.session_ends_at_ms
                self._client_context = psk.ticket.client_context
                if psk.ticket.client_certificate_der:
                    result.peer_chain_der = (psk.ticket.client_certificate_der,)

        limit = config.record_size_limit if offer.record_size_limit is not None else None
        flight = _encrypted_extensions(config.advertise_groups, limit, offer.server_name is not None, alpn)
        if credential is None:
            self._transcript.update(flight)
            self._finish_flight(flight, requested_certificate=False)
            return
        client_auth = self._client_auth = config.client_auth(offer.server_name)
        if client_auth is not None:
            flight += self._make_certificate_request(client_auth)
        flight += credential.certificate_message(offer.status_request)
        self._transcript.update(flight)
        self._flight = flight
        self._sign_request = SignRequest(credential.key_id, scheme, Role.SERVER, self._transcript.digest())

    def _choose_credential(self, offer: ClientOffer) -> tuple[Credential, int]:
        if offer.signature_algorithms is None or offer.supported_groups is None:
            raise MissingExtension("no usable PSK, and not both signature_algorithms and supported_groups")
        provider = self._config.credentials
        schemes = PeerSchemes(offer.signature_algorithms, offer.signature_algorithms_cert or offer.signature_algorithms)
        credential = None if provider is None else provider(offer.server_name, schemes)
        if credential is None:
            raise NoCredential("no certificate is configured for this client")
        scheme = choose_scheme(credential.schemes, offer.signature_algorithms)
        if scheme is None:
            raise NoCommonSignatureScheme("the client verifies no signature scheme of our key")
        return credential, scheme

    def _install_handshake_keys(self) -> None:
        suite = self._suite
        transcript_hash = self._transcript.digest()
        self._client_secret = self._handshake_stage.client_traffic_secret(transcript_hash)
        self._server_secret = self._handshake_stage.server_traffic_secret(transcript_hash)
        key_log = self._config.key_log
        if key_log is not None:
            self._log_secret(key_log, "CLIENT_HANDSHAKE_TRAFFIC_SECRET", self._client_random, self._client_secret)
            self._log_secret(key_log, "SERVER_HANDSHAKE_TRAFFIC_SECRET", self._client_random, self._server_secret)
        reader, writer = self._reader, self._writer
        reader.set_key(suite, *traffic_key(suite, self._client_secret))
        writer.set_key(suite, *traffic_key(suite, self._server_secret))
        reader.plaintext_alerts_allowed = True
        if self._offer.early_data:
            reader.early_data_skipping = EarlyDataSkipping.UNDECRYPTABLE
        limit, peer_limit = self._config.record_size_limit, self._offer.record_size_limit
        if limit is not None and peer_limit is not None:
            reader.limit(limit)
            writer.record_size_max = peer_limit

    def _make_certificate_request(self, client_auth: ClientAuthentication) -> bytes:
        extensions: Extensions = {
            Extension.SIGNATURE_ALGORITHMS: serialize_signature_algorithms(HANDSHAKE_SCHEMES),
            Extension.SIGNATURE_ALGORITHMS_CERT: serialize_signature_algorithms(CERTIFICATE_SCHEMES),
        }
        if client_auth.authorities:
            extensions[Extension.CERTIFICATE_AUTHORITIES] = serialize_certificate_authorities(client_auth.authorities)
        return serialize_certificate_request(CertificateRequest(b"", extensions))

    def _continue_with_signature(self, request: SignRequest, signature: bytes) -> None:
        certificate_verify = serialize_certificate_verify(request.scheme, signature)
        self._transcript.update(certificate_verify)
        flight, self._flight = self._flight + certificate_verify, b""
        self._finish_flight(flight, requested_certificate=self._client_auth is not None)
        self._process()

    def _finish_flight(self, flight: bytes, *, requested_certificate: bool) -> None:
        """Adds Finished, sends the flight, and goes on to the application keys in the sending direction (RFC 8446
        §7.1).
        """
        suite, transcript = self._suite, self._transcript
        finished = serialize_finished(finished_verify_data(suite.hash, self._server_secret, transcript.digest()))
        transcript.update(finished)
        self._send_record(ContentType.HANDSHAKE, flight + finished)
        transcript_hash = transcript.digest()
        master_stage = self._master_stage = self._handshake_stage.master_stage()
        tx, rx = (
            TrafficKeys(suite, master_stage.server_traffic_secret(transcript_hash)),
            TrafficKeys(suite, master_stage.client_traffic_secret(transcript_hash)),
        )
        result = self._result
        result.tx, result.rx = tx, rx
        result.exporter_secret = master_stage.exporter_secret(transcript_hash)
        key_log = self._config.key_log
        if key_log is not None:
            self._log_secret(key_log, "CLIENT_TRAFFIC_SECRET_0", self._client_random, rx.secret)
            self._log_secret(key_log, "SERVER_TRAFFIC_SECRET_0", self._client_random, tx.secret)
            self._log_secret(key_log, "EXPORTER_SECRET", self._client_random, result.exporter_secret)
        self._writer.set_key(suite, tx.key, tx.iv)
        # RFC 8446 §4.2.9: no ticket that could not be used. That is all that is still needed of the ClientHello.
        self._client_resumes = PskKeyExchangeMode.PSK_DHE_KE in (self._offer.psk_modes or b"")
        del self._offer
        self.state = ServerState.EXPECT_CERTIFICATE if requested_certificate else ServerState.EXPECT_FINISHED

    # --- the client's second flight

    def _handle_certificate(self, message: bytes) -> None:
        client_auth = self._client_auth
        assert client_auth is not None
        certificate = parse_certificate(message)
        if certificate.context:
            raise IllegalParameter("the client's Certificate has a context that was not in the request")
        for entry in certificate.entries:
            if entry.extensions:
                raise UnsolicitedExtension("the client's Certificate has an extension that was not requested")
        self._transcript.update(message)
        if not certificate.entries:
            if client_auth.required:
                raise CertificateRequired("the client has no certificate and has to have one")
            self.state = ServerState.EXPECT_FINISHED
            return
        self._peer_key = load_certificate(certificate.entries[0].certificate_der)
        chain_der = tuple(entry.certificate_der for entry in certificate.entries)
        client_auth.verify(chain_der, self._now_s)
        self._result.peer_chain_der = chain_der
        self._client_context = client_auth.context
        expires_at_ms = int(self._peer_key.not_valid_after_utc.timestamp() * 1000)
        self._session_ends_at_ms = min(self._session_ends_at_ms, expires_at_ms)
        self.state = ServerState.EXPECT_CERTIFICATE_VERIFY

    def _handle_certificate_verify(self, message: bytes) -> None:
        assert self._peer_key is not None
        scheme, signature = parse_certificate_verify(message)
        if scheme not in HANDSHAKE_SCHEMES:
            raise IllegalParameter(f"CertificateVerify uses the scheme {scheme:#06x}, which was not requested")
        verify_with_certificate(self._peer_key, scheme, Role.CLIENT, self._transcript.digest(), signature)
        self._peer_key = None
        self._transcript.update(message)
        self.state = ServerState.EXPECT_FINISHED

    def _handle_finished(self, message: bytes) -> None:
        hash_, transcript = self._suite.hash, self._transcript
        expected = finished_verify_data(hash_, self._client_secret, transcript.digest())
        if not hmac.compare_digest(parse_finished(message, hash_.size), expected):
            raise BadFinished("the client's Finished does not match")
        if self._client_resumes and self._config.ticket_keys is not None and self._config.ticket_count:
            transcript.update(message)
            self._emit_tickets(self._config.ticket_keys, self._master_stage.resumption_secret(transcript.digest()))
        result = self._result
        result.tx.sequence = self._writer.sequence
        result.record_size_max = self._writer.record_size_max
        self._established = result
        self._transcript = None
        self.state = ServerState.COMPLETE

    def _emit_tickets(self, ticket_keys: TicketKeys, resumption_secret: bytes) -> None:
        config, suite, result = self._config, self._suite, self._result
        client_certificate = result.peer_chain_der[0] if result.peer_chain_der else b""
        if len(client_certificate) > CLIENT_CERTIFICATE_SIZE_MAX:
            return
        now_ms = int(self._now_s * 1000)
        lifetime_s = min(config.ticket_lifetime_s, (self._session_ends_at_ms - now_ms) // 1000)
        if lifetime_s <= 0:
            return
        messages = b""
        for number in range(config.ticket_count):
            nonce = number.to_bytes(1, "big")
            age_add = int.from_bytes(self._random(4), "big")
            contents = TicketContents(
                suite.code,
                now_ms,
                self._session_ends_at_ms,
                lifetime_s,
                age_add,
                ticket_psk(suite.hash, resumption_secret, nonce),
                result.server_name or "",
                client_certificate,
                self._client_context,
            )
            ticket = ticket_keys.seal(contents, self._random(TICKET_NONCE_SIZE))
            messages += serialize_new_session_ticket(NewSessionTicket(lifetime_s, age_add, nonce, ticket, {}))
        self._send_record(ContentType.HANDSHAKE, messages)


ServerHandshake.TRANSITIONS = {
    ServerState.EXPECT_CLIENT_HELLO: {
        HandshakeType.CLIENT_HELLO: Expectation(ServerHandshake._handle_client_hello, CLIENT_HELLO_SIZE_MAX, True),
    },
    ServerState.EXPECT_SECOND_CLIENT_HELLO: {
        HandshakeType.CLIENT_HELLO: Expectation(
            ServerHandshake._handle_second_client_hello, CLIENT_HELLO_SIZE_MAX, True
        ),
    },
    ServerState.EXPECT_CERTIFICATE: {
        HandshakeType.CERTIFICATE: Expectation(ServerHandshake._handle_certificate, CERTIFICATE_SIZE_MAX, False),
    },
    ServerState.EXPECT_CERTIFICATE_VERIFY: {
        HandshakeType.CERTIFICATE_VERIFY: Expectation(
            ServerHandshake._handle_certificate_verify, CERTIFICATE_VERIFY_SIZE_MAX, False
        ),
    },
    ServerState.EXPECT_FINISHED: {
        HandshakeType.FINISHED: Expectation(ServerHandshake._handle_finished, FINISHED_SIZE_MAX, True),
    },
    ServerState.COMPLETE: {},
}
