"""The functions of libtls: what programs are written against, by name and parameter; more may be added behind."""

from __future__ import annotations

import inspect

import pytest

import libtls

CONTRACT = {
    "tls_init": ["path"],
    "tls_destroy": [],
    "tls_open": ["host", "port"],
    "tls_connect": ["host", "port"],
    "tls_start": ["conn"],
    "tls_listen": [],
    "tls_accept": ["listener"],
    "tls_read": ["conn", "n"],
    "tls_write": ["conn", "data"],
    "tls_close": ["conn"],
    "tls_try": ["op"],
    "tls_wait": ["op", "timeout"],
    "tls_try_cancel": ["op"],
    "tls_barrier": ["conn"],
    "tls_oper_state_destroy": ["op"],
    "tls_adopt": ["fd"],
    "tls_export": ["conn"],
}


@pytest.mark.parametrize("function", CONTRACT)
def test_functions(function: str) -> None:
    wanted = CONTRACT[function]
    signature = inspect.signature(getattr(libtls, function))
    assert list(signature.parameters)[: len(wanted)] == wanted
    signature.bind(*wanted)  # by position, and nothing else is needed
    signature.bind(**dict.fromkeys(wanted))
    assert function in libtls.__all__


def test_waiting_is_for_ever_unless_told_otherwise() -> None:
    assert inspect.signature(libtls.tls_wait).parameters["timeout"].default is None
    assert inspect.signature(libtls.tls_init).parameters["path"].default is None
