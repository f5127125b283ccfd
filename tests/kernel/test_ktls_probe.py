"""kdaemon.ktls on a kernel that has kTLS: what it says is held against what the kernel does."""

from __future__ import annotations

import os
import socket

import pytest

from kdaemon import ktls

pytestmark = [pytest.mark.guest, pytest.mark.guest_core]

SUITES = sorted(ktls.CIPHERS)


@pytest.fixture(scope="module")
def support() -> ktls.KtlsSupport:
    return ktls.probe()


def test_the_guest_has_ktls(support: ktls.KtlsSupport) -> None:
    assert support.available, support.detail
    assert support.reason == "available"
    assert "tls" in ktls.available_ulps()


def test_every_suite_works_in_both_directions(support: ktls.KtlsSupport) -> None:
    assert support.suites == frozenset(SUITES), support.refused
    assert not support.refused


def test_the_options_of_this_kernel_are_found(support: ktls.KtlsSupport) -> None:
    # The guests are mainline's code, so mainline's history tells what each must have.
    release = tuple(int(part) for part in os.uname().release.split("-")[0].split("+")[0].split(".")[:2])
    assert support.expect_no_pad == (release >= (6, 0))
    assert support.tx_zerocopy_ro == (release >= (5, 19))
    assert support.rekey == (release >= (6, 14))
    assert support.tx_max_payload == (release >= (6, 19))


def test_the_probe_leaves_no_connection_and_counts_one_install_per_direction_and_socket() -> None:
    before = ktls.tls_stat()
    ktls.probe()
    after = ktls.tls_stat()
    assert after["TlsTxSw"] - before["TlsTxSw"] == after["TlsRxSw"] - before["TlsRxSw"] == len(SUITES) + 4
    assert after["TlsCurrTxSw"] == before["TlsCurrTxSw"]
    assert after["TlsCurrRxSw"] == before["TlsCurrRxSw"]
    assert after["TlsDecryptError"] == before["TlsDecryptError"]


@pytest.mark.parametrize("suite", SUITES, ids=[ktls.SUITE_NAMES[suite] for suite in SUITES])
@pytest.mark.parametrize("sequence", [0, 1, (1 << 32) - 1, 1 << 40])
def test_crypto_info_is_what_rfc_8446_says(suite: int, sequence: int) -> None:
    """The kernel's record opens with `cryptography` under the nonce and additional data of RFC 8446, section 5."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305

    key, iv, text = os.urandom(ktls.CIPHERS[suite][1]), os.urandom(12), b"sent through the kernel"
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        receiver, _ = listener.accept()
        with receiver:
            sender.setsockopt(socket.IPPROTO_TCP, ktls.TCP_ULP, b"tls")
            sender.setsockopt(ktls.SOL_TLS, ktls.TLS_TX, ktls.crypto_info(suite, key, iv, sequence))
            sender.sendall(text)
            header = receiver.recv(5, socket.MSG_WAITALL)
            body = receiver.recv(int.from_bytes(header[3:], "big"), socket.MSG_WAITALL)
    nonce = (int.from_bytes(iv, "big") ^ sequence).to_bytes(12, "big")
    aead = ChaCha20Poly1305(key) if suite == 0x1303 else AESGCM(key)
    assert aead.decrypt(nonce, body, header) == text + b"\x17"


def test_a_changed_record_is_refused_and_counted() -> None:
    suite = SUITES[0]
    before = ktls.tls_stat()["TlsDecryptError"]
    info = ktls.crypto_info(suite, bytes(16), bytes(12), 0)
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        receiver, _ = listener.accept()
        with receiver:
            receiver.setsockopt(socket.IPPROTO_TCP, ktls.TCP_ULP, b"tls")
            receiver.setsockopt(ktls.SOL_TLS, ktls.TLS_RX, info)
            sender.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))
            with pytest.raises(OSError, match="Bad message"):
                receiver.recv(100)
    assert ktls.tls_stat()["TlsDecryptError"] == before + 1


def test_crypto_info_refuses_wrong_lengths() -> None:
    with pytest.raises(ValueError, match="key of 16 bytes"):
        ktls.crypto_info(0x1301, bytes(32), bytes(12), 0)
    with pytest.raises(ValueError, match="iv of 12"):
        ktls.crypto_info(0x1303, bytes(32), bytes(8), 0)
    with pytest.raises(KeyError):
        ktls.crypto_info(0x1305, bytes(16), bytes(12), 0)
