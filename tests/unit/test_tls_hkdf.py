"""The worker's HMAC gives what hmac.digest gives."""

import hmac
import os
import threading

import pytest

from kdaemon.tls import key_schedule

hkdf = pytest.importorskip("kdaemon_pyx.hkdf", reason="the extensions are not built")


@pytest.mark.parametrize("name", ["sha256", "sha384"])
def test_equals_the_general_one(name):
    for key_size in (0, 1, 31, 32, 48, 63, 64):
        for message_size in (0, 1, 31, 54, 55, 56, 64, 127, 128, 1000):
            key, message = os.urandom(key_size), os.urandom(message_size)
            assert hkdf.hmac_digest(key, message, name) == hmac.digest(key, message, name)


def test_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="sha256 or sha384"):
        hkdf.hmac_digest(b"key", b"message", "sha512")
    with pytest.raises(ValueError, match="no longer"):
        hkdf.hmac_digest(bytes(65), b"message", "sha256")
    with pytest.raises(TypeError):
        hkdf.hmac_digest(bytearray(32), b"message", "sha256")


def test_threads_do_not_disturb_each_other():
    key, message = bytes(32), bytes(54)
    expected = hmac.digest(key, message, "sha256")
    wrong = []

    def work():
        wrong.extend(1 for _ in range(2000) if hkdf.hmac_digest(key, message, "sha256") != expected)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_key_schedule_with_it():
    suite = key_schedule.SUITES[0x1302]
    before = key_schedule.traffic_key(suite, bytes(48))
    key_schedule.use_hmac(hkdf.hmac_digest)
    try:
        assert key_schedule.traffic_key(suite, bytes(48)) == before
        assert key_schedule.export_keying_material(suite.hash, bytes(48), b"label", b"", 200)
    finally:
        key_schedule.use_hmac(hmac.digest)
