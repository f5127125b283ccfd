"""Shares that are no shares: degenerate X25519 points, points off their curve, ML-KEM keys out of range."""

import pytest

from kdaemon.tls.constants import NamedGroup
from kdaemon.tls.errors import BadKeyShare
from kdaemon.tls.key_exchange import (
    SUPPORTED_GROUPS,
    HybridKeyShare,
    answer_key_share,
    generate_key_share,
)

# Points of small order, and their non-canonical forms (RFC 7748 §6.1, and the list that implementations share).
LOW_ORDER = [
    "0000000000000000000000000000000000000000000000000000000000000000",
    "0100000000000000000000000000000000000000000000000000000000000000",
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
P256_PRIME = 2**256 - 2**224 + 2**192 + 2**96 - 1
MLKEM_SIZE = 1184


@pytest.mark.parametrize("group", SUPPORTED_GROUPS)
def test_agreement(group):
    client = generate_key_share(group)
    server_share, secret = answer_key_share(group, client.public, generate_key_share)
    assert client.exchange(server_share) == secret
    assert len(secret) == {NamedGroup.X25519MLKEM768: 64, NamedGroup.SECP384R1: 48}.get(group, 32)


@pytest.mark.parametrize("point", LOW_ORDER)
def test_degenerate_x25519(point):
    with pytest.raises(BadKeyShare):
        generate_key_share(NamedGroup.X25519).exchange(bytes.fromhex(point))
    hybrid = HybridKeyShare()
    share = hybrid.public[:MLKEM_SIZE] + bytes.fromhex(point)
    with pytest.raises(BadKeyShare):
        answer_key_share(NamedGroup.X25519MLKEM768, share, generate_key_share)


@pytest.mark.parametrize("group", SUPPORTED_GROUPS)
def test_sizes(group):
    share = generate_key_share(group)
    peer, _ = answer_key_share(group, share.public, generate_key_share)
    for wrong in (b"", peer[:-1], peer + b"\x00", peer[:1]):
        with pytest.raises(BadKeyShare):
            share.exchange(wrong)
    for wrong in (b"", share.public[:-1], share.public + b"\x00"):
        with pytest.raises(BadKeyShare):
            answer_key_share(group, wrong, generate_key_share)


@pytest.mark.parametrize("group", [NamedGroup.SECP256R1, NamedGroup.SECP384R1])
def test_points_off_the_curve(group):
    share = generate_key_share(group)
    good = generate_key_share(group).public
    size = (len(good) - 1) // 2
    wrong = [
        b"\x04" + bytes(2 * size),
        b"\x04" + good[1 : 1 + size] + bytes(size),
        good[:-1] + bytes((good[-1] ^ 1,)),
        b"\x04" + b"\xff" * (2 * size),
        b"\x02" + good[1 : 1 + size],  # compressed
        b"\x06" + good[1:],  # hybrid form
        b"\x00",  # infinity
    ]
    if group == NamedGroup.SECP256R1:
        x = int.from_bytes(good[1:33], "big")
        if x + P256_PRIME < 2**256:
            wrong.append(b"\x04" + (x + P256_PRIME).to_bytes(32, "big") + good[33:])
    for point in wrong:
        with pytest.raises(BadKeyShare):
            share.exchange(point)


def test_mlkem_key_out_of_range():
    """FIPS 203 §7.2: coefficients are below 3329."""
    share = HybridKeyShare().public
    with pytest.raises(BadKeyShare):
        answer_key_share(NamedGroup.X25519MLKEM768, b"\xff" * 1152 + share[1152:], generate_key_share)


def test_mlkem_ciphertext_that_is_wrong_gives_another_secret():
    """Implicit rejection (FIPS 203 §6.3): the handshake then fails at its first protected record."""
    client = HybridKeyShare()
    server_share, secret = answer_key_share(NamedGroup.X25519MLKEM768, client.public, generate_key_share)
    changed = bytes((server_share[0] ^ 1,)) + server_share[1:]
    assert client.exchange(changed)[:32] != secret[:32]
    assert client.exchange(changed)[32:] == secret[32:]
