"""The public keys of an identity provider (RFC 7517): in a file, or at an https address."""

import asyncio
import http.client
import json
import logging
import math
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import jwt

from loraplex_service.errors import Unavailable
from loraplex_service.reloaded_files import ReloadedFiles

FETCH_SECONDS = 5.0
LIFE_SECONDS = 300.0  # before keys are fetched again
KEPT_SECONDS = 3600.0  # for which the last keys stay in use while fetching fails
RETRY_SECONDS = 10.0  # from one fetch to the next, whatever key ids tokens name

logger = logging.getLogger(__name__)


class FileKeys:
    """The public keys in a file, which is read again when it changes."""

    def __init__(self, file: str) -> None:
        """Read the file. Raises ValueError, OSError for a file that cannot be used."""
        self._keys = ReloadedFiles([file], lambda: _read_keys(Path(file)))

    async def find(self, token: str) -> jwt.PyJWK:
        """The key that the token says it is signed with. Raises jwt.PyJWTError."""
        key = _key_of(token, self._keys.get())
        if key is None:
            raise jwt.InvalidKeyError("it is signed with a key that is not in the set")
        return key


class RemoteKeys:
    """The public keys at an https address: fetched at first use, and again for the first token after they expire.

    While fetching fails, the last keys stay in use for KEPT_SECONDS, and the log says so; a call waits for it at most
    once. For one event loop.
    """

    def __init__(self, address: str, ca: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """`ca`: a PEM file of the authorities to trust for the address; None: those of the system.

        Raises ValueError, OSError for a file that cannot be used.
        """
        self._address = address
        self._clock = clock
        self._client = ReloadedFiles([ca] if ca else [], lambda: _client(address, ca))
        self._keys: jwt.PyJWKSet | None = None
        self._fetched = self._tried = -math.inf
        self._fetching: asyncio.Task[None] | None = None
        self._fails = False

    async def find(self, token: str) -> jwt.PyJWK:
        """The key that the token says it is signed with. Raises jwt.PyJWTError, and Unavailable if it cannot be had."""
        if self._age() > LIFE_SECONDS:
            await self._refresh(wait=not self._fails or self._age() > KEPT_SECONDS)
        if self._keys is None or self._age() > KEPT_SECONDS:
            raise _unavailable()
        key = _key_of(token, self._keys)
        if key is None:  # the provider may have begun to use a new one
            await self._refresh(wait=True)
            key = _key_of(token, self._keys)
        if key is None and self._fails:
            raise _unavailable()
        if key is None:
            raise jwt.InvalidKeyError("it is signed with a key that is not in the set")
        return key

    def _age(self) -> float:
        return self._clock() - self._fetched

    async def _refresh(self, wait: bool) -> None:
        """Fetch the keys: one fetch at a time for all callers, and not too often, since a token may name any key."""
        if self._fetching is None or self._fetching.done():
            if self._clock() - self._tried < RETRY_SECONDS:
                return
            self._tried = self._clock()
            self._fetching = asyncio.create_task(self._fetch())
        if wait:
            await asyncio.wait({self._fetching})

    async def _fetch(self) -> None:
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                keys = await asyncio.to_thread(self._client.get().get_jwk_set)
        except (jwt.PyJWTError, OSError, ValueError, http.client.HTTPException) as error:
            if not self._fails:
                logger.error(
                    "the keys at %s cannot be fetched; the next attempt follows soon: %s. Tokens are checked with "
                    "the last keys, if any, until these are %d minutes old; then tokens are refused as UNAVAILABLE",
                    self._address,
                    str(error) or type(error).__name__,
                    KEPT_SECONDS // 60,
                )
            self._fails = True
            return
        if self._fails:
            logger.info("the keys at %s can be fetched again", self._address)
        self._fails = False
        self._keys, self._fetched = keys, self._clock()


def _client(address: str, ca: str | None) -> jwt.PyJWKClient:
    try:
        context = ssl.create_default_context(cafile=ca)
    except ssl.SSLError as error:
        raise ValueError(f"{ca}: not a PEM file with certificates of authorities: {error}") from error
    return jwt.PyJWKClient(address, cache_jwk_set=False, timeout=FETCH_SECONDS, ssl_context=context)


def _key_of(token: str, keys: jwt.PyJWKSet) -> jwt.PyJWK | None:
    """The key with this id. A set of one key needs no id."""
    key_id = jwt.get_unverified_header(token).get("kid")
    signing = [key for key in keys.keys if key.public_key_use in ("sig", None)]
    if key_id is None:
        return signing[0] if len(signing) == 1 else None
    return next((key for key in signing if key.key_id == key_id), None)


def _unavailable() -> Unavailable:
    return Unavailable(
        "OVERLOADED", "the keys for checking bearer tokens cannot be fetched now; try again", RETRY_SECONDS
    )


def _read_keys(file: Path) -> jwt.PyJWKSet:
    try:
        return jwt.PyJWKSet.from_dict(json.loads(file.read_text()))
    except (jwt.PyJWTError, ValueError) as error:
        raise ValueError(f"{file}: not a set of public keys: {error}") from error
