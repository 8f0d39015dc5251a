"""Adapters are trusted by their digest, or by a signature of it with a known key."""

import base64
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from loraplex_adapters.files.trust import SIGNATURE_FILE, is_trusted, public_key, sign

DIGEST, OTHER = "a" * 64, "b" * 64


class Signer:
    def __init__(self, directory: Path) -> None:
        key = Ed25519PrivateKey.generate()
        self.private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.public = directory / f"{id(self)}.pem"
        self.public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer(tmp_path)


def test_a_listed_digest_is_trusted(tmp_path: Path) -> None:
    assert is_trusted(DIGEST, tmp_path, {DIGEST}, [])
    assert not is_trusted(OTHER, tmp_path, {DIGEST}, [])


def test_a_signature_by_a_known_key_is_trusted(tmp_path: Path, signer: Signer) -> None:
    (tmp_path / SIGNATURE_FILE).write_bytes(sign(DIGEST, signer.private))
    assert is_trusted(DIGEST, tmp_path, set(), [Signer(tmp_path).public, signer.public])
    assert not is_trusted(DIGEST, tmp_path, set(), [Signer(tmp_path).public])


def test_a_signature_is_good_for_one_digest_alone(tmp_path: Path, signer: Signer) -> None:
    (tmp_path / SIGNATURE_FILE).write_bytes(sign(OTHER, signer.private))
    assert not is_trusted(DIGEST, tmp_path, set(), [signer.public])


@pytest.mark.parametrize("content", [b"", b"!", base64.b64encode(b"short"), base64.b64encode(bytes(64)), bytes(5000)])
def test_what_is_no_signature_is_not_trusted(tmp_path: Path, signer: Signer, content: bytes) -> None:
    (tmp_path / SIGNATURE_FILE).write_bytes(content)
    assert not is_trusted(DIGEST, tmp_path, set(), [signer.public])


def test_keys_of_another_kind_are_refused() -> None:
    key = generate_private_key(65537, 2048)
    with pytest.raises(ValueError, match="no Ed25519 key"):
        sign(DIGEST, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(ValueError, match="no Ed25519 key"):
        public_key(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
