"""Bearer tokens in a key file, which holds only their hashes.

A token is `lpx_{id}_{secret}`: the id finds its entry, the secret has 256 random bits. So a plain hash protects it:
there is nothing to guess, and nothing to slow down (passwords are another matter).
"""

import hashlib
import os
import secrets
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from hmac import compare_digest
from pathlib import Path

import msgspec
import yaml

from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_service.auth.principal import Principal, Role
from loraplex_service.errors import Unauthenticated
from loraplex_service.reloaded_files import ReloadedFiles

PREFIX = "lpx_"
_NO_HASH = "0" * 64  # the hash that a token with an unknown id is compared with


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One token, as its entry in the key file describes it."""

    id: str
    sha256: str  # SHA-256 of the whole token, hexadecimal
    tenant: str
    roles: tuple[Role, ...]
    expires: datetime | None = None
    comment: str = ""


class KeyFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The content of a key file."""

    keys: tuple[Key, ...] = ()


def read_keys(file: Path) -> KeyFile:
    """Read a key file. Raises ValueError saying what is wrong with the file, OSError."""
    try:
        fields = yaml.safe_load(file.read_text())
        if fields is None:  # perhaps it is being written
            raise ValueError(f"{file}: it is empty; `keys: []` stands for a file without keys")
        content = msgspec.convert(fields, KeyFile)
    except (yaml.YAMLError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: {error}") from error
    ids = [key.id for key in content.keys]
    for key in content.keys:
        if ids.count(key.id) > 1:
            raise ValueError(f"{file}: the key {key.id!r} appears twice")
        if not is_id(key.tenant):
            raise ValueError(f"{file}: key {key.id!r}: tenant {key.tenant!r} must be {ID_RULE}")
        if key.expires is not None and key.expires.tzinfo is None:
            raise ValueError(f"{file}: key {key.id!r}: expires needs a time zone, such as 2027-01-31T00:00:00Z")
    return content


def write_keys(file: Path, content: KeyFile) -> None:
    """Replace the key file atomically, with access for its owner only."""
    text = yaml.safe_dump(msgspec.to_builtins(content), sort_keys=False)
    descriptor, name = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(descriptor, "w") as temporary:
            temporary.write(text)
            temporary.flush()
            os.fsync(temporary.fileno())
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise


def make_key(tenant: str, roles: Iterable[Role], expires: datetime | None, comment: str = "") -> tuple[str, Key]:
    """Make a token, to be shown once, and the entry that is kept of it."""
    key_id = secrets.token_hex(6)
    token = f"{PREFIX}{key_id}_{secrets.token_urlsafe(32)}"
    return token, Key(
        id=key_id, sha256=_hash(token), tenant=tenant, roles=tuple(roles), expires=expires, comment=comment
    )


class KeyVerifier:
    """Checks tokens against a key file, which is read again when it changes."""

    def __init__(self, file: str) -> None:
        """Read the key file. Raises ValueError, OSError."""
        self._keys = ReloadedFiles([file], lambda: {key.id: key for key in read_keys(Path(file)).keys})

    @staticmethod
    def takes(token: str) -> bool:
        """Whether the token has the form of a key-file token."""
        return token.startswith(PREFIX)

    def verify(self, token: str) -> Principal:
        """Return the principal of a token. Raises Unauthenticated."""
        key = self._keys.get().get(token.removeprefix(PREFIX).partition("_")[0])
        # Always one hash and one comparison, in constant time: how long it takes says nothing about the keys.
        is_it = compare_digest(_hash(token), _NO_HASH if key is None else key.sha256)
        if key is None or not is_it:
            raise Unauthenticated("this server does not know the bearer token")
        if key.expires is not None and key.expires.timestamp() <= time.time():
            raise Unauthenticated(f"the bearer token {key.id} expired at {key.expires.astimezone(UTC):%F %T} UTC")
        return Principal(key.id, key.tenant, frozenset(key.roles))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode(errors="surrogatepass")).hexdigest()
