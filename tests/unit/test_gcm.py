"""Every implementation of AES-GCM that this machine has: the same records, whichever is chosen."""

import ctypes.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kdaemon_pyx import gcm

# Seals and opens beside an independent implementation, at lengths that code for many blocks at a time may get wrong.
PROGRAM = """
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from kdaemon_pyx.gcm import IMPLEMENTATION
from kdaemon_pyx.record import RecordError, RecordProtection

iv = bytes(range(12))
around = (128, 256, 512, 768, 1024, 2048, 4096, 8192)
lengths = [*range(70), *(n + d for n in around for d in (-2, -1, 0, 1)), 16383, 16384]
for suite, key in ((0x1301, bytes(range(16))), (0x1302, bytes(range(32)))):
    tx = RecordProtection(suite, key, iv)
    rx = RecordProtection(suite, key, iv, encrypt=False)
    for sequence, length in enumerate(lengths):
        plaintext = bytes(i * 7 % 256 for i in range(length))
        nonce = (int.from_bytes(iv, "big") ^ sequence).to_bytes(12, "big")
        header = b"\\x17\\x03\\x03" + (length + 17).to_bytes(2, "big")
        record = tx.seal(23, plaintext)
        assert record == header + AESGCM(key).encrypt(nonce, plaintext + b"\\x17", header), (suite, length)
        for position in {0, 3, 5, len(record) - 1} - {0}:
            changed = bytearray(record)
            changed[position] ^= 0x40
            try:
                rx.open(bytes(changed))
            except RecordError:
                continue
            raise AssertionError((suite, length, position))
        assert rx.open(record) == (23, plaintext), (suite, length)
print(IMPLEMENTATION)
"""


def run(wanted: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"KDAEMON_GCM": wanted, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("wanted", ["", "avx2", "libcrypto"])
def test_agrees_with_an_independent_implementation(wanted: str) -> None:
    result = run(wanted)
    assert result.returncode == 0, result.stderr
    used = result.stdout.strip()
    assert used in ("vaes_avx512", "avx2", "libcrypto")
    if wanted == "avx2":
        assert used != "vaes_avx512"
    if wanted == "libcrypto":
        assert used == "libcrypto"


def test_refuses_a_name_it_does_not_know() -> None:
    result = run("fast")
    assert result.returncode == 1
    assert "ImportError: KDAEMON_GCM is 'fast': must be avx2 or libcrypto, or not be set" in result.stderr


def test_uses_the_library_where_it_is() -> None:
    capable = set(Path("/proc/cpuinfo").read_text().split()) >= {"avx2", "aes", "pclmulqdq"}
    if not os.environ.get("KDAEMON_GCM"):
        found = ctypes.util.find_library("IPSec_MB") is not None
        assert (gcm.IMPLEMENTATION != "libcrypto") == (capable and found)
