"""The adapters that a tenant accepts: those with a listed digest, and those signed by a trusted key.

A signature is Ed25519 (RFC 8032) over the line "loraplex-adapter sha256:{digest}", in base64, in the file adapter.sig
beside the weights. The digest covers every file that is used, so nothing of an adapter can change under its signature.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Collection
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

SIGNATURE_FILE = "adapter.sig"
MAX_SIGNATURE_BYTES = 1024


def public_key(pem: bytes) -> Ed25519PublicKey:
    """Read an Ed25519 public key in PEM. Raises ValueError if it is something else."""
    key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("it is no Ed25519 key")
    return key


def sign(digest: str, private_key_pem: bytes) -> bytes:
    """The content of adapter.sig.

    Raises ValueError unless the key is an Ed25519 private key in PEM without password.
    """
    try:
        key = load_pem_private_key(private_key_pem, password=None)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError("it is no Ed25519 key")
    return base64.b64encode(key.sign(_statement(digest))) + b"\n"


def is_trusted(digest: str, directory: Path, digests: Collection[str], key_files: Collection[Path]) -> bool:
    """Whether the digest is listed, or adapter.sig in the directory holds a signature of it by one of the keys.

    Raises OSError and ValueError for a key that cannot be read.
    """
    if digest in digests:
        return True
    signature = _read_signature(directory / SIGNATURE_FILE)
    keys = [public_key(file.read_bytes()) for file in key_files]
    return signature is not None and any(_verifies(key, signature, digest) for key in keys)


def _statement(digest: str) -> bytes:
    return f"loraplex-adapter sha256:{digest}".encode()


def _read_signature(file: Path) -> bytes | None:
    try:
        with file.open("rb") as opened:
            return base64.b64decode(opened.read(MAX_SIGNATURE_BYTES).strip(), validate=True)
    except (OSError, binascii.Error):
        return None


def _verifies(key: Ed25519PublicKey, signature: bytes, digest: str) -> bool:
    try:
        key.verify(signature, _statement(digest))
    except InvalidSignature:
        return False
    return True
