"""Traces captured from OpenSSL with its key log, replayed byte for byte (``tests/pair/tls_trace.py`` makes them)."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pair"))
import tls_trace

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "openssl-traces.json"
TRACES = json.loads(VECTORS.read_text())


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace["name"])
def test_replay(trace):
    lines = []
    handshake = (tls_trace.make_client if trace["role"] == "client" else tls_trace.make_server)(trace, lines.append)
    for who, data in trace["flights"]:
        if who == "ours":
            assert handshake.data_to_send().hex() == data
        else:
            handshake.receive(bytes.fromhex(data))
            tls_trace.sign(trace, handshake)
    assert handshake.complete
    assert sorted(lines) == trace["key_log"]
    established = handshake.established
    assert established.cipher_suite == trace["suite"]
    assert established.group == trace["groups"][-1]
    assert established.retried == (len(trace["groups"]) > 1)
    assert established.resumed == ("session" in trace)
