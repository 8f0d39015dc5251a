"""Tenants: the quota of each, and what separates it from the others.

A tenant's requests and tokens per second come out of buckets that fill at its rates. Its weight and its priority go to
the engines, which share their steps by them (`engine/loraplex_engine/scheduling/fairness.py`).
"""

import hmac
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Protocol

import msgspec

from loraplex_adapters.files.trust import public_key
from loraplex_adapters.grammar import is_digest
from loraplex_engine.link.bounds import Bounds
from loraplex_service.errors import QuotaExceeded

REMEMBERED_TENANTS = 4096  # tenants that the configuration does not name


class TenantConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The quota of one tenant. What is left out has no limit."""

    BOUNDS: ClassVar[dict[str, Bounds]] = {
        "weight": Bounds(0.001, 1000),  # the counters of tenants with weights so far apart stay distinct for years
        "max_priority": Bounds(-100, 100),
    }

    weight: float = 1.0  # weight of the tenant's share of an engine, when tenants ask for more than it can do
    max_priority: int = 0  # requests that ask for a higher priority get this; priority comes before shares
    # beyond it calls of any method are refused as TENANT_QUOTA; each item of a batch counts as one
    requests_per_second: float | None = None
    # tokens of prompts and outputs together; beyond it requests are refused as TENANT_QUOTA
    tokens_per_second: float | None = None
    burst_seconds: float = 10.0  # a burst may take so many seconds' worth of both rates
    # adapter versions, including those of equal files under other names, and uploads in progress
    max_adapters: int | None = None
    # weights of all versions together, on disk, and the announced sizes of uploads in progress
    max_adapter_bytes: int | None = None
    max_uploads: int | None = 4  # uploads in progress at once
    max_routes: int | None = 1000  # routes
    max_state_bytes: int | None = 16 << 20  # records of its routes and adapters, labels included
    # if this or `adapter_keys` is set, adapters must be listed here, or signed by one of those keys
    adapter_digests: tuple[str, ...] = ()
    adapter_keys: tuple[str, ...] = ()  # Ed25519 public keys: PEM files. See `adapter_digests`
    # tenants with the same group share cached prefixes; a tenant without one shares with no other
    cache_group: str | None = None

    @property
    def trusts_some_alone(self) -> bool:
        """Whether only listed or signed adapters are accepted."""
        return bool(self.adapter_digests or self.adapter_keys)

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; the general checks of numbers are made elsewhere."""
        for digest in self.adapter_digests:
            if not is_digest(digest.removeprefix("sha256:")):
                yield f"adapter_digests: {digest[:80]!r} is not a digest: 64 hexadecimal digits are expected"
        for file in self.adapter_keys:
            try:
                public_key(Path(file).read_bytes())
            except (OSError, ValueError) as error:
                yield f"adapter_keys: {file}: {error}"


class Bucket(Protocol):
    """What a tenant's requests or tokens per second come out of."""

    def take(self, amount: float) -> float: ...

    def give_back(self, amount: float) -> None: ...


MakeBucket = Callable[[str, float, float], Bucket]  # by its name, its rate and the seconds of a burst


class TokenBucket:
    """Fills at a rate up to the size of a burst. A larger cost is let in when the bucket is full, on credit."""

    def __init__(self, rate: float, burst_seconds: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._capacity = max(1.0, rate * burst_seconds)
        self._clock = clock
        self._level = self._capacity
        self._time = clock()

    def take(self, amount: float) -> float:
        """Take this amount and return 0.

        With too little left, take nothing and return the seconds until there is enough.
        """
        self._fill()
        missing = min(amount, self._capacity) - self._level
        if missing > 0:
            return missing / self._rate
        self._level -= amount
        return 0.0

    def give_back(self, amount: float) -> None:
        """Give back an amount that was taken and not used; negative: take what was used beyond it."""
        self._fill()
        self._level = min(self._capacity, self._level + amount)

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._capacity, self._level + self._rate * (now - self._time))
        self._time = now


class Tenant:
    """One tenant: its limits, and how much is left of each. For one event loop."""

    def __init__(
        self,
        name: str,
        config: TenantConfig,
        cache_key: bytes,
        clock: Callable[[], float] = time.monotonic,
        make_bucket: MakeBucket | None = None,
    ) -> None:
        """`cache_key`: a secret, the same for all tenants of a server. `make_bucket`: None: the server's own."""
        self.name = name
        self.config = config
        self._cache_key = cache_key
        make = make_bucket or (lambda name, rate, burst: TokenBucket(rate, burst, clock))
        burst = config.burst_seconds
        rates = {"requests": config.requests_per_second, "tokens": config.tokens_per_second}
        self._requests, self._tokens = (
            None if rate is None else make(f"{name}: {what}", rate, burst) for what, rate in rates.items()
        )

    def count_request(self) -> None:
        """Count a request before any work for it. Raises QuotaExceeded if there are too many."""
        seconds = self._requests.take(1) if self._requests is not None else 0.0
        if seconds > 0:
            raise self._exceeded("requests per second", f"{self.config.requests_per_second:g}", seconds)

    @contextmanager
    def spending(self, expected_tokens: int, used_tokens: Callable[[], int]) -> Iterator[None]:
        """Hold the tokens that a request is expected to use; at the end of the block charge those that it used.

        Raises QuotaExceeded.
        """
        if self._tokens is None:
            yield
            return
        seconds = self._tokens.take(expected_tokens)
        if seconds > 0:
            raise self._exceeded("tokens per second", f"{self.config.tokens_per_second:g}", seconds)
        try:
            yield
        finally:
            self._tokens.give_back(expected_tokens - used_tokens())

    def check_adapters(self, count: int, size_bytes: int) -> None:
        """Raise QuotaExceeded if the tenant may not have so many versions, or so many bytes of them."""
        self._check_amount("adapter versions", count, self.config.max_adapters)
        self._check_amount("bytes of adapters", size_bytes, self.config.max_adapter_bytes)

    def check_uploads(self, count: int) -> None:
        """Raise QuotaExceeded if the tenant may not have so many uploads in progress."""
        self._check_amount("uploads in progress", count, self.config.max_uploads)

    def check_routes(self, count: int) -> None:
        """Raise QuotaExceeded if the tenant may not have so many routes."""
        self._check_amount("routes", count, self.config.max_routes)

    def check_state(self, size_bytes: int) -> None:
        """Raise QuotaExceeded if the tenant may not have so many bytes of routes and adapter records."""
        self._check_amount("bytes of routes and adapter records", size_bytes, self.config.max_state_bytes)

    def _check_amount(self, what: str, value: int, limit: int | None) -> None:
        if limit is not None and value > limit:
            message = f"tenant {self.name!r} would then have {value} {what}, and it may have {limit}"
            raise QuotaExceeded(f"tenants/{self.name}: {what}", f"{message}; delete some first", 0.0)

    def priority(self, wanted: int) -> int:
        """The priority for a request that asks for this one, within the tenant's limit."""
        return min(wanted, self.config.max_priority)

    def cache_salt(self, salt: str) -> str:
        """The salt in the hashes of this tenant's cached prefixes, beside the adapter and the tokens.

        A keyed hash, so that no caller can make the salt of another tenant's prefixes.
        """
        group = self.config.cache_group
        owner = (f"tenant {self.name}" if group is None else f"group {group}").encode()
        return hmac.digest(self._cache_key, len(owner).to_bytes(4) + owner + salt.encode(), "sha256").hex()

    def _exceeded(self, what: str, limit: str, seconds: float) -> QuotaExceeded:
        message = f"tenant {self.name!r} has used up its {limit} {what}; try again in {seconds:.1f} s"
        return QuotaExceeded(f"tenants/{self.name}: {what}", message, seconds)


class Tenants:
    """All tenants: those of the configuration by their names, and others as they come."""

    def __init__(
        self,
        configured: Mapping[str, TenantConfig] | None = None,
        others: TenantConfig | None = None,
        clock: Callable[[], float] = time.monotonic,
        cache_key: bytes | None = None,  # a secret; None: a new one
        make_bucket: MakeBucket | None = None,  # None: the server's own buckets
    ) -> None:
        self._clock = clock
        self._make_bucket = make_bucket
        self._cache_key = cache_key or secrets.token_bytes(32)
        self._configured = {name: self._make(name, config) for name, config in (configured or {}).items()}
        self._others: OrderedDict[str, Tenant] = OrderedDict()  # least recently seen first
        self._others_config = others or TenantConfig()

    def get(self, name: str) -> Tenant:
        """The tenant with this id."""
        if name in self._configured:
            return self._configured[name]
        tenant = self._others.get(name)
        if tenant is None:
            tenant = self._others[name] = self._make(name, self._others_config)
            if len(self._others) > REMEMBERED_TENANTS:
                self._others.popitem(last=False)
        self._others.move_to_end(name)
        return tenant

    def _make(self, name: str, config: TenantConfig) -> Tenant:
        return Tenant(name, config, self._cache_key, self._clock, self._make_bucket)
