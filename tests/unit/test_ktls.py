"""kdaemon.ktls wherever it runs: its answer agrees with the kernel's, and each reason has its cause."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kdaemon import ktls

ROOT = Path(__file__).resolve().parent.parent.parent


def kernel_takes_the_ulp() -> bool:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        try:
            client.setsockopt(socket.IPPROTO_TCP, ktls.TCP_ULP, b"tls")
        except OSError:
            return False
        return True


def test_the_probe_agrees_with_the_kernel() -> None:
    support = ktls.probe()
    if kernel_takes_the_ulp():
        assert support.reason in ("available", "no-cipher")
        assert support.available == bool(support.suites)
    else:
        assert (support.available, support.reason, support.suites) == (False, "no-ulp", frozenset())
        assert "TCP_ULP" in support.detail
        assert not ktls.tls_stat() or "tls" in ktls.available_ulps()


def test_a_sandbox_that_forbids_the_ulp_is_named() -> None:
    """A real seccomp filter on setsockopt(_, _, TCP_ULP, ...) in a child."""
    code = """
import ctypes, struct, sys
# BPF: setsockopt (54) with optname 31 gives EPERM, all else is allowed.
lines = [(0x20, 0, 0, 0), (0x15, 0, 3, 54), (0x20, 0, 0, 32), (0x15, 0, 1, 31), (0x06, 0, 0, 0x00050001),
         (0x06, 0, 0, 0x7FFF0000)]
program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in lines))
fprog = struct.pack("=HxxxxxxQ", len(lines), ctypes.addressof(program))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, fprog, 0, 0) == 0
sys.path.insert(0, sys.argv[1])
from kdaemon import ktls
print(ktls.probe().reason)
"""
    command = [sys.executable, "-c", code, str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "forbidden\n"


@pytest.mark.parametrize("suite", sorted(ktls.CIPHERS))
def test_crypto_info_lays_out_the_kernels_struct(suite: int) -> None:
    """struct tls12_crypto_info_*: version, cipher type, iv, key, salt, rec_seq (linux/tls.h)."""
    cipher_type, key_length, salt_length, _ = ktls.CIPHERS[suite]
    key, iv = bytes(range(100, 100 + key_length)), bytes(range(12))
    info = ktls.crypto_info(suite, key, iv, 0x0102030405060708)
    assert info[:4] == (0x0304).to_bytes(2, sys.byteorder) + cipher_type.to_bytes(2, sys.byteorder)
    assert info[4:] == iv[salt_length:] + key + iv[:salt_length] + bytes(range(1, 9))
