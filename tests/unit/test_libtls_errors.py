"""libtls.errors: one class for each thing that can go wrong, and docs/libtls.md has them all."""

from __future__ import annotations

import errno
import inspect
import re
from pathlib import Path

import pytest
from kdaemon_pyx import client_abi as abi

from libtls import errors

MANUAL = Path(__file__).resolve().parent.parent.parent / "docs" / "libtls.md"


def test_the_hierarchy_is_the_documented_one() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \| \S", MANUAL.read_text(), re.MULTILINE)
    documented = {name: re.findall(r"\w+", bases) for name, bases in rows}
    defined = {
        name: [base.__name__ for base in class_.__bases__]
        for name, class_ in inspect.getmembers(errors, inspect.isclass)
        if class_.__module__ == errors.__name__
    }
    assert documented == defined


@pytest.mark.parametrize(
    ("detail", "expected"),
    [
        (abi.DETAIL_CERTIFICATE_BAD, errors.CertificateBad),
        (abi.DETAIL_CERTIFICATE_EXPIRED, errors.CertificateExpired),
        (abi.DETAIL_CERTIFICATE_NAME, errors.CertificateNameMismatch),
        (abi.DETAIL_CERTIFICATE_SELF_SIGNED, errors.CertificateSelfSigned),
        (abi.DETAIL_CERTIFICATE_UNTRUSTED, errors.CertificateUntrusted),
    ],
)
def test_each_failure_of_a_certificate_is_a_class_of_its_own(detail: int, expected: type[errors.TlsError]) -> None:
    error = errors.error_from(-errno.EKEYREJECTED, detail, abi.OPEN)
    assert type(error) is expected
    assert isinstance(error, errors.CertificateError)
    assert error.errno == errno.EKEYREJECTED
    assert "certificate" in str(error)


def test_an_alert_is_named() -> None:
    received = errors.error_from(-errno.EPROTO, abi.DETAIL_ALERT_RECEIVED | 120, abi.OPEN)
    assert (type(received), received.alert) == (errors.AlertReceived, 120)
    assert "no_application_protocol" in str(received)
    sent = errors.error_from(-errno.EPROTO, abi.DETAIL_ALERT_SENT | 40, abi.OPEN)
    assert (type(sent), sent.alert) == (errors.HandshakeError, 40)
    assert "handshake_failure" in str(sent)
