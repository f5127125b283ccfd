"""The user-mode record layer against an independent AEAD (cryptography's) and at its edges."""

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from kdaemon_pyx.record import RecordError, RecordProtection

SUITES = {0x1301: (AESGCM, 16), 0x1302: (AESGCM, 32), 0x1303: (ChaCha20Poly1305, 32)}
EBADMSG, EPROTO, EMSGSIZE, EKEYEXPIRED = 74, 71, 90, 127


def nonce(iv: bytes, sequence: int) -> bytes:
    return bytes(a ^ b for a, b in zip(iv, sequence.to_bytes(12, "big"), strict=True))


def seal(suite: int, key: bytes, iv: bytes, sequence: int, inner: bytes) -> bytes:
    header = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
    return header + SUITES[suite][0](key).encrypt(nonce(iv, sequence), inner, header)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("length", [0, 1, 15, 16, 17, 1000, 16383, 16384])
def test_seals_what_another_implementation_opens(suite: int, length: int) -> None:
    aead, key_length = SUITES[suite]
    key, iv, plaintext = bytes(range(key_length)), bytes(range(12)), bytes(i % 251 for i in range(length))
    protection = RecordProtection(suite, key, iv, sequence=2**24 - 1)
    for sequence in (2**24 - 1, 2**24):
        record = protection.seal(23, plaintext)
        assert record[:5] == b"\x17\x03\x03" + (length + 17).to_bytes(2, "big")
        assert aead(key).decrypt(nonce(iv, sequence), record[5:], record[:5]) == plaintext + b"\x17"
    assert protection.sequence == 2**24 + 1


@pytest.mark.parametrize("suite", SUITES)
def test_opens_what_another_implementation_seals(suite: int) -> None:
    key, iv = b"k" * SUITES[suite][1], b"i" * 12
    protection = RecordProtection(suite, key, iv, sequence=7, encrypt=False)
    records = [
        (23, b"data", 0),
        (22, b"message", 1),
        (21, b"\x01\x00", 300),
        (23, b"", 0),
        (23, b"\0" * 16384, 0),
        (23, b"x", 16383),
    ]
    for sequence, (content_type, content, padding) in enumerate(records, 7):
        record = seal(suite, key, iv, sequence, content + bytes([content_type]) + b"\0" * padding)
        assert protection.open(record) == (content_type, content)


def test_refuses_what_is_not_authentic_and_keeps_its_sequence() -> None:
    key, iv = b"k" * 16, b"i" * 12
    protection = RecordProtection(0x1301, key, iv, encrypt=False)
    record = seal(0x1301, key, iv, 0, b"data\x17")
    for position in range(len(record)):
        changed = bytearray(record)
        changed[position] ^= 1
        with pytest.raises(RecordError) as failure:
            protection.open(bytes(changed))
        assert failure.value.errno == (EPROTO if position == 0 else EBADMSG)
    assert protection.open(record) == (23, b"data")


def test_names_the_bad_shapes() -> None:
    key, iv = b"k" * 16, b"i" * 12

    def error(record: bytes) -> int:
        with pytest.raises(RecordError) as failure:
            RecordProtection(0x1301, key, iv, encrypt=False).open(record)
        return failure.value.errno

    assert error(seal(0x1301, key, iv, 0, b"\0" * 20)) == EPROTO  # no content type
    assert error(seal(0x1301, key, iv, 0, b"x" * 16385 + b"\x17")) == EMSGSIZE  # more than 2^14 bytes of content
    assert error(b"\x17\x03\x03\x41\x01" + b"x" * 16641) == EMSGSIZE  # over 2^14 + 256 on the wire
    assert error(b"\x17\x03\x03\x00\x10" + b"x" * 16) == EBADMSG  # no room for a content type
    assert error(b"\x16\x03\x03\x00\x20" + b"x" * 32) == EPROTO  # not protected


def test_stops_at_the_aead_limit() -> None:
    limit = RecordProtection(0x1301, b"k" * 16, b"i" * 12).records_max
    assert limit == int(2**24.5)
    last = RecordProtection(0x1301, b"k" * 16, b"i" * 12, sequence=limit - 1)
    last.seal(23, b"the last one")
    with pytest.raises(RecordError) as failure:
        last.seal(23, b"one too many")
    assert failure.value.errno == EKEYEXPIRED
