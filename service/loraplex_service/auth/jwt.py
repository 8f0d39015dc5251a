"""Bearer tokens of an identity provider (RFC 7519), checked against its published keys (RFC 7517)."""

import hashlib
import math
import time
from collections import OrderedDict
from typing import Any

import jwt

from loraplex_adapters.grammar import is_id
from loraplex_service.auth.config import JwtConfig
from loraplex_service.auth.jwks import FileKeys, RemoteKeys
from loraplex_service.auth.principal import Principal, Role
from loraplex_service.errors import Unauthenticated

REMEMBERED_TOKENS = 4096
REMEMBERED_SECONDS = 60.0  # that a token outlives the key that it was checked with


class JwtVerifier:
    """Checks tokens, and remembers valid ones for a while. For one event loop."""

    def __init__(self, config: JwtConfig) -> None:
        """Read the keys, if they are in a file. Raises ValueError, OSError for a file that cannot be used."""
        self._config = config
        self._keys = RemoteKeys(config.jwks, config.jwks_ca) if config.is_remote else FileKeys(config.jwks)
        self._good: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()  # until when; oldest first

    async def verify(self, token: str) -> Principal:
        """Return the principal of a token. Raises Unauthenticated, and Unavailable if the keys cannot be fetched."""
        digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
        until, principal = self._good.get(digest, (0.0, None))
        if principal is not None and time.time() < until:
            return principal
        try:
            claims = self._claims(token, await self._keys.find(token))
        except jwt.ExpiredSignatureError:
            raise Unauthenticated("the bearer token has expired") from None
        except jwt.PyJWTError as error:
            raise Unauthenticated(f"the bearer token is not valid: {error}") from None
        principal = self._principal(claims)
        self._remember(digest, min(claims["exp"], time.time() + REMEMBERED_SECONDS), principal)
        return principal

    def _claims(self, token: str, key: jwt.PyJWK) -> dict[str, Any]:
        """The verified claims of a token. Raises jwt.PyJWTError."""
        config = self._config
        try:
            claims = jwt.decode(
                token,
                key,
                algorithms=list(config.algorithms),
                issuer=config.issuer,
                audience=config.audience,
                leeway=config.leeway_seconds,
                options={"require": ["exp", "iss", "aud"]},
            )
        except (TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
            raise jwt.InvalidTokenError("a claim in it is of another type than it must be") from error
        for name in ("exp", "nbf", "iat"):
            if name in claims and not _is_time(claims[name]):
                raise jwt.InvalidTokenError(f"its claim {name!r} is not a number of seconds")
        return claims

    def _principal(self, claims: dict[str, Any]) -> Principal:
        tenant = claims.get(self._config.tenant_claim)
        if not isinstance(tenant, str) or not is_id(tenant):
            raise Unauthenticated(f"the bearer token names no tenant in its claim {self._config.tenant_claim!r}")
        roles = claims.get(self._config.roles_claim, [Role.INFERENCE])
        if not isinstance(roles, list):
            raise Unauthenticated(f"the claim {self._config.roles_claim!r} of the bearer token is not a list")
        known = frozenset(role for role in Role if role in roles)  # a provider has roles for others too
        return Principal(str(claims.get("sub", "")), tenant, known)

    def _remember(self, digest: bytes, until: float, principal: Principal) -> None:
        self._good[digest] = (until, principal)
        self._good.move_to_end(digest)
        if len(self._good) > REMEMBERED_TOKENS:
            self._good.popitem(last=False)


def _is_time(claim: object) -> bool:
    return isinstance(claim, int | float) and not isinstance(claim, bool) and math.isfinite(claim)
