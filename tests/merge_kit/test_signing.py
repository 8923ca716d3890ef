"""Keys and signatures."""

from __future__ import annotations

import os

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from merge_kit import signing
from merge_kit.errors import FederationError, MergeKitError, SignatureError
from tests.merge_kit.helpers import says

CONTEXT = signing.MANIFEST_CONTEXT


def write_pem(path, key, password=None):
    lock = (
        serialization.BestAvailableEncryption(password)
        if password
        else serialization.NoEncryption()
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)
    )
    return path


@pytest.fixture
def key(tmp_path):
    """RFC 8032, section 7.1, test 1: the secret key."""
    secret = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    return write_pem(tmp_path / "site.pem", Ed25519PrivateKey.from_private_bytes(secret))


def test_a_fixed_key_gives_a_fixed_public_key(key):
    """RFC 8032: d75a9801...07511a, in base64."""
    assert signing.public_key(key) == "ed25519:11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo="


def test_a_fixed_key_gives_fixed_signatures(key):
    """With nothing to sign, RFC 8032's own signature: e5564300...51 00b."""
    assert signing.sign(key, b"", b"").signature == (
        "5VZDAMNgrHKQhuLMgG6CioSHfx645dl02HPgZSJJAVVfuIIVkKM7rMYeOXAc+bRr0lv18FlbviRlUUFDjnoQCw=="
    )
    assert signing.sign(key, b"merge-kit-manifest-v1\n", b"{}").signature == (
        "8rfl9hTlpFhhlEu4IR2ycm3pVFo0MruaO6mIwf2EAaxXD/Jd8lQpoFn6obQgaXHI2XNdfrSPZIOrHr+spkQVCQ=="
    )


def test_a_signature_by_a_new_key_verifies(tmp_path):
    public = signing.create_key(tmp_path / "keys" / "site.pem")
    signature = signing.sign(tmp_path / "keys" / "site.pem", CONTEXT, b"data")
    signing.verify(signature, CONTEXT, b"data", "the manifest")
    assert signature.key == public == signing.public_key(tmp_path / "keys" / "site.pem")


@pytest.mark.parametrize("what", ["data", "context", "key", "bytes", "base64", "length", "no key"])
def test_anything_that_changes_makes_a_signature_invalid(key, tmp_path, what):
    good = signing.sign(key, CONTEXT, b"data")
    other = signing.create_key(tmp_path / "other.pem")
    changed = {
        "key": signing.Signature(other, good.signature),
        "bytes": signing.Signature(good.key, "A" + good.signature[1:]),
        "base64": signing.Signature(good.key, good.signature + "é"),
        "length": signing.Signature(good.key, good.signature[:-4]),
        "no key": signing.Signature("nobody", good.signature),
    }.get(what, good)
    context = b"other\n" if what == "context" else CONTEXT
    data = b"datA" if what == "data" else b"data"
    with says(
        SignatureError,
        "the manifest does not carry a valid signature: it was changed after it was signed, "
        "or signed by somebody else; ask the site to publish again.",
    ):
        signing.verify(changed, context, data, "the manifest")


def test_only_the_owner_can_read_a_new_key(tmp_path):
    before = os.umask(0)
    try:
        signing.create_key(tmp_path / "site.pem")
    finally:
        os.umask(before)
    assert (tmp_path / "site.pem").stat().st_mode & 0o777 == 0o600


def test_a_key_is_never_rewritten(tmp_path):
    public = signing.create_key(tmp_path / "site.pem")
    with pytest.raises(MergeKitError, match="is there already: a key is never written over"):
        signing.create_key(tmp_path / "site.pem")
    assert signing.public_key(tmp_path / "site.pem") == public


@pytest.mark.parametrize(
    "text",
    ["", "ed25519:", "ed25519:AAAA", "ed25519:!" + "A" * 43, "rsa:" + "A" * 43 + "=", "ed25519:é"],
)
def test_a_malformed_public_key_is_refused(text):
    with says(
        FederationError,
        f"'{text}' is no public key: it must read 'ed25519:' and 44 characters, "
        "as 'merge-kit join' prints it.",
    ):
        signing.parse_public_key(text)


def test_a_missing_key_is_named(tmp_path):
    with says(
        FederationError,
        f"{tmp_path}/no.pem does not exist: the site's key is missing; restore it, or join again.",
    ):
        signing.sign(tmp_path / "no.pem", CONTEXT, b"")


def test_a_key_of_another_kind_is_refused(tmp_path):
    path = write_pem(tmp_path / "ec.pem", ec.generate_private_key(ec.SECP256R1()))
    with says(FederationError, f"{path} is not an Ed25519 key: merge-kit signs with Ed25519."):
        signing.public_key(path)


@pytest.mark.parametrize("content", [b"", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", b"\xff\xfe"])
def test_a_broken_key_is_refused(tmp_path, content):
    (tmp_path / "site.pem").write_bytes(content)
    with says(FederationError, f"{tmp_path}/site.pem is no readable private key in PEM format."):
        signing.public_key(tmp_path / "site.pem")


def test_a_key_with_a_password_is_refused(tmp_path):
    path = write_pem(tmp_path / "site.pem", Ed25519PrivateKey.generate(), b"secret")
    with says(FederationError, f"{path} is no readable private key in PEM format."):
        signing.public_key(path)
