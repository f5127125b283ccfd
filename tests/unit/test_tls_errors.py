"""Facts and alerts: every alert of the RFC belongs to a fact, and every fact reaches the wire as its alert."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pair"))
import tls_pair

from kdaemon.tls import errors
from kdaemon.tls.constants import AlertDescription


def facts():
    return sorted(errors._ALERTS, key=lambda fact: fact.__name__)


def test_every_alert_belongs_to_a_fact():
    alerts = {code for code in vars(AlertDescription).values() if isinstance(code, int)}
    assert set(errors._ALERTS.values()) | {AlertDescription.CLOSE_NOTIFY} == alerts


def test_alerts_received_are_of_another_kind():
    assert not issubclass(errors.AlertReceived, errors.TlsFault)
    assert not issubclass(errors.TlsFault, errors.AlertReceived)
    assert issubclass(errors.CloseNotifyReceived, errors.AlertReceived)


@pytest.mark.parametrize("fact", facts(), ids=lambda fact: fact.__name__)
def test_every_fact_reaches_the_peer(fact):
    fault = fact("why")
    assert fault.alert == errors.alert_for(fault) == errors._ALERTS[fact]
    assert fault.name == fact.__name__
    client = tls_pair.make_client(tls_pair.client_config())
    server = tls_pair.make_server(tls_pair.server_config())
    server.receive(client.data_to_send())
    server.cancel(fault)  # ServerHello is made: the alert goes out under the handshake keys
    with pytest.raises(errors.AlertReceived) as info:
        client.receive(server.data_to_send())
    # user_canceled announces the end, close_notify makes it (RFC 8446 §6.1).
    expected = AlertDescription.CLOSE_NOTIFY if fact is errors.HandshakeCanceled else errors._ALERTS[fact]
    assert info.value.description == expected
