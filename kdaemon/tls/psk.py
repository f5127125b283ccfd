"""Pre-shared keys on the server's side (RFC 8446 §4.2.11): which of the offered ones is used, and the proof that the
client knows it.
"""

import hashlib
import hmac
from typing import Final

from kdaemon.tls.configuration import ServerConfig
from kdaemon.tls.constants import PSK_IDENTITIES_TRIED_MAX, TICKET_LIFETIME_MAX_S, PskKeyExchangeMode
from kdaemon.tls.errors import BadBinder
from kdaemon.tls.extensions import PskIdentity
from kdaemon.tls.key_schedule import SUITES, EarlyStage, HashParameters, SuiteParameters, finished_verify_data
from kdaemon.tls.negotiation import ClientOffer
from kdaemon.tls.tickets import TicketContents

#: How far a client's idea of its ticket's age may be from ours before the ticket is taken for a replay or a clock
#: fault.
TICKET_AGE_TOLERANCE_MS: Final = 60_000


class PskChoice:
    """The PSK that is used: its place in the offer, its early stage, and where it comes from."""

    __slots__ = ("early_stage", "external_identity", "index", "suite", "ticket")

    def __init__(
        self,
        index: int,
        suite: SuiteParameters,
        psk: bytes,
        ticket: TicketContents | None,
        external_identity: bytes | None,
    ) -> None:
        self.index = index
        self.suite = suite
        self.early_stage = EarlyStage(suite.hash, psk)
        self.ticket = ticket
        self.external_identity = external_identity


def choose_psk(
    config: ServerConfig, offer: ClientOffer, suite: SuiteParameters, now_s: float, *, suite_fixed: bool = False
) -> PskChoice | None:
    """The first usable PSK.

    ``suite`` is the one negotiated without regard to PSKs; a PSK of another hash may choose another.
    """
    if offer.psks is None or offer.psk_modes is None or PskKeyExchangeMode.PSK_DHE_KE not in offer.psk_modes:
        return None
    for index, identity in enumerate(offer.psks.identities[:PSK_IDENTITIES_TRIED_MAX]):
        found = _find(config, offer, identity, now_s)
        if found is None:
            continue
        hash_, psk, ticket, external_identity = found
        usable = _suite_with_hash(hash_, suite, () if suite_fixed else config.cipher_suites, offer.hello.cipher_suites)
        if usable is not None:
            return PskChoice(index, usable, psk, ticket, external_identity)
    return None


def _find(
    config: ServerConfig, offer: ClientOffer, offered: PskIdentity, now_s: float
) -> tuple[HashParameters, bytes, TicketContents | None, bytes | None] | None:
    if config.external_psk is not None:
        external = config.external_psk(offered.identity)
        if external is not None:
            return external.hash, external.key, None, external.identity
    if config.ticket_keys is None:
        return None
    ticket = config.ticket_keys.open(offered.identity)
    if ticket is None or not _ticket_acceptable(config, offer, offered, ticket, now_s):
        return None
    return SUITES[ticket.cipher_suite].hash, ticket.psk, ticket, None


def _ticket_acceptable(
    config: ServerConfig, offer: ClientOffer, offered: PskIdentity, ticket: TicketContents, now_s: float
) -> bool:
    if ticket.cipher_suite not in SUITES:
        return False
    now_ms = int(now_s * 1000)
    age_ms = now_ms - ticket.issued_at_ms
    if now_ms > ticket.session_ends_at_ms:
        return False
    if age_ms < -TICKET_AGE_TOLERANCE_MS or age_ms > 1000 * min(ticket.lifetime_s, TICKET_LIFETIME_MAX_S):
        return False
    claimed_age_ms = (offered.obfuscated_ticket_age - ticket.age_add) & 0xFFFFFFFF
    if abs(claimed_age_ms - max(age_ms, 0)) > TICKET_AGE_TOLERANCE_MS:
        return False
    if ticket.server_name != (offer.server_name or ""):  # RFC 6066 §3: a session belongs to its name
        return False
    client_auth = config.client_auth(offer.server_name)
    if client_auth is None:
        return True
    if not ticket.client_certificate_der:
        return not client_auth.required
    return ticket.client_context == client_auth.context


def _suite_with_hash(
    hash_: HashParameters, suite: SuiteParameters, ours: tuple[int, ...], theirs: tuple[int, ...]
) -> SuiteParameters | None:
    if suite.hash is hash_:
        return suite
    for code in ours:
        if code in theirs and SUITES[code].hash is hash_:
            return SUITES[code]
    return None


def verify_binder(choice: PskChoice, offer: ClientOffer, transcript_before: bytes) -> None:
    """Checks the binder of the chosen PSK, and only that one (RFC 8446 §4.2.11.2).

    ``transcript_before``: message_hash and HelloRetryRequest after a retry, else empty. Raises BadBinder.
    """
    if offer.psks is None:
        raise ValueError("no PSK was offered")
    hash_ = choice.suite.hash
    transcript = hashlib.new(hash_.name, transcript_before)
    transcript.update(offer.message[: -offer.psks.binders_size])
    binder_key = choice.early_stage.binder_key(choice.external_identity is not None)
    expected = finished_verify_data(hash_, binder_key, transcript.digest())
    if not hmac.compare_digest(expected, offer.psks.binders[choice.index]):
        raise BadBinder("the PSK binder does not match")
