"""Bearer tokens of an identity provider (RFC 7519), checked against its published keys (RFC 7517)."""

import asyncio
import hashlib
import json
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import jwt

from service.auth.config import JwtConfig
from service.auth.principal import TENANT_ID, Principal, Role
from service.errors import Unauthenticated, Unavailable
from service.files import Reloaded

REMEMBERED_TOKENS = 4096
REMEMBERED_SECONDS = 60.0  # a key that the provider takes back is believed no longer than this
FETCH_SECONDS = 5.0
KEYS_LIFE_SECONDS = 300  # before a remote set of keys is fetched again


class _Keys(Protocol):
    async def find(self, token: str) -> jwt.PyJWK:
        """The key that the token says it is signed with. Raises jwt.PyJWTError."""


class JwtVerifier:
    """Checks tokens, and remembers for a while which were good. For one event loop."""

    def __init__(self, config: JwtConfig) -> None:
        """Raises ValueError, OSError for a file of keys that cannot be read."""
        self._config = config
        self._keys: _Keys = _RemoteKeys(config.jwks) if config.is_remote else _FileKeys(config.jwks)
        self._good: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()  # until when; oldest first

    async def verify(self, token: str) -> Principal:
        """Raises Unauthenticated, and Unavailable if the provider's keys cannot be had."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        until, principal = self._good.get(digest, (0.0, None))
        if principal is not None and time.time() < until:
            return principal
        try:
            claims = await self._claims(token)
        except jwt.PyJWKClientConnectionError as error:
            raise Unavailable("OVERLOADED", "the keys that tokens are checked with cannot be had; try again") from error
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the bearer token has expired") from None
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the bearer token is not valid: {error}") from None
        principal = self._principal(claims)
        self._remember(digest, min(claims["exp"], time.time() + REMEMBERED_SECONDS), principal)
        return principal

    async def _claims(self, token: str) -> dict[str, Any]:
        config = self._config
        key = await self._keys.find(token)
        return jwt.decode(
            token,
            key,
            algorithms=list(config.algorithms),
            issuer=config.issuer,
            audience=config.audience,
            leeway=config.leeway_seconds,
            options={"require": ["exp", "iss", "aud"]},
        )

    def _principal(self, claims: dict[str, Any]) -> Principal:
        tenant = claims.get(self._config.tenant_claim)
        if not isinstance(tenant, str) or not TENANT_ID.fullmatch(tenant):
            raise Unauthenticated(f"the bearer token names no tenant in its claim {self._config.tenant_claim!r}")
        roles = claims.get(self._config.roles_claim, [Role.INFERENCE])
        if not isinstance(roles, list):
            raise Unauthenticated(f"the claim {self._config.roles_claim!r} of the bearer token is no list")
        known = frozenset(role for role in Role if role in roles)  # a provider has roles for others too
        return Principal(str(claims.get("sub", "")), tenant, known)

    def _remember(self, digest: bytes, until: float, principal: Principal) -> None:
        self._good[digest] = (until, principal)
        self._good.move_to_end(digest)
        if len(self._good) > REMEMBERED_TOKENS:
            self._good.popitem(last=False)


class _FileKeys:
    def __init__(self, file: str) -> None:
        self._keys = Reloaded([file], lambda: _read_keys(Path(file)))

    async def find(self, token: str) -> jwt.PyJWK:
        keys = self._keys.get()
        key_id = jwt.get_unverified_header(token).get("kid")
        if key_id is None and len(keys.keys) == 1:
            return keys.keys[0]
        try:
            return keys[str(key_id)]
        except KeyError:
            raise jwt.InvalidKeyError("it is signed with a key that is not in the set") from None


class _RemoteKeys:
    def __init__(self, address: str) -> None:
        self._client = jwt.PyJWKClient(address, lifespan=KEYS_LIFE_SECONDS, timeout=FETCH_SECONDS)

    async def find(self, token: str) -> jwt.PyJWK:
        return await asyncio.to_thread(self._client.get_signing_key_from_jwt, token)


def _read_keys(file: Path) -> jwt.PyJWKSet:
    try:
        return jwt.PyJWKSet.from_dict(json.loads(file.read_text()))
    except (jwt.PyJWTError, ValueError) as error:
        raise ValueError(f"{file}: not a set of public keys: {error}") from error
