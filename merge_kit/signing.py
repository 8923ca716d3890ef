"""Keys and signatures: Ed25519 over canonical bytes with a context prefix."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from merge_kit.errors import FederationError, SignatureError
from merge_kit.files import canonical_json, storage_errors
from merge_kit.strictjson import read_json

MANIFEST_CONTEXT = b"merge-kit-manifest-v1\n"
WITHDRAWAL_CONTEXT = b"merge-kit-withdrawal-v1\n"
FEDERATION_CONTEXT = b"merge-kit-federation-v1\n"
APPROVAL_CONTEXT = b"merge-kit-approval-v1\n"
_PREFIX = "ed25519:"


@dataclass(frozen=True, slots=True)
class Signature:
    """A detached signature: who claims it and the 64 bytes, base64."""

    key: str
    signature: str

    def to_bytes(self) -> bytes:
        """What is stored beside the signed bytes: canonical JSON."""
        return canonical_json({"key": self.key, "signature": self.signature})


def create_key(path: Path) -> str:
    """Write a new private key (PEM, readable by its owner alone) and return its public key.

    The key is never rewritten: a site that loses or replaces it has to be admitted again.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise FederationError(
                f"{path} is there already: a key is never written over; choose another file."
            ) from None
        with os.fdopen(handle, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
    return _text_of(key.public_key())


def public_key(path: Path) -> str:
    """The public key of a private key file, as ``ed25519:<base64>``."""
    return _text_of(_load_private(path).public_key())


def sign(path: Path, context: bytes, data: bytes) -> Signature:
    """Sign `context + data` with the private key in `path`."""
    key = _load_private(path)
    raw = key.sign(context + data)
    return Signature(_text_of(key.public_key()), base64.b64encode(raw).decode())


def verify(signature: Signature, context: bytes, data: bytes, what: str) -> None:
    """Check a signature; `what` names the signed thing in the error.

    Raises
    ------
    SignatureError
        The bytes are not what the key's owner signed.
    """
    try:
        raw = base64.b64decode(signature.signature, validate=True)
        parse_public_key(signature.key).verify(raw, context + data)
    except (InvalidSignature, binascii.Error, ValueError, FederationError) as error:
        raise SignatureError(
            f"{what} does not carry a valid signature: it was changed after it was signed, "
            "or signed by somebody else; ask the site to publish again."
        ) from error


def parse_signature(data: bytes, where: str, otherwise: str) -> Signature:
    """What `Signature.to_bytes` gave; `otherwise` is the sentence for what it did not give.

    Raises
    ------
    SignatureError
        It is no signature, or names a key twice.
    """
    content = read_json(data, where, SignatureError, otherwise)
    try:
        return Signature(str(content["key"]), str(content["signature"]))
    except (KeyError, TypeError) as error:
        raise SignatureError(otherwise) from error


def parse_public_key(text: str) -> Ed25519PublicKey:
    """The key that ``ed25519:<base64>`` stands for.

    Raises
    ------
    FederationError
        The text is no such key.
    """
    try:
        if not text.startswith(_PREFIX):
            raise ValueError("no prefix")
        return Ed25519PublicKey.from_public_bytes(
            base64.b64decode(text.removeprefix(_PREFIX), validate=True)
        )
    except (ValueError, binascii.Error) as error:
        raise FederationError(
            f"'{text}' is no public key: it must read 'ed25519:' and 44 characters, "
            "as 'merge-kit join' prints it."
        ) from error


def _text_of(key: Ed25519PublicKey) -> str:
    raw = key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    return _PREFIX + base64.b64encode(raw).decode()


def _load_private(path: Path) -> Ed25519PrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except FileNotFoundError:
        raise FederationError(
            f"{path} does not exist: the site's key is missing; restore it, or join again."
        ) from None
    except (ValueError, TypeError) as error:
        raise FederationError(f"{path} is no readable private key in PEM format.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FederationError(f"{path} is not an Ed25519 key: merge-kit signs with Ed25519.")
    return key
