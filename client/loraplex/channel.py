"""Way to a server: address, credentials, retries, what accompanies every call."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict, cast

import grpc
import grpc.aio

from loraplex.async_channel import AsyncChannel

# UNAVAILABLE is the only code that means "try again, perhaps another replica". A call is retried only until the server
# admits it, so nothing is ever generated twice; mutations carry an id that makes them idempotent. Hedging is left out:
# it would generate everything twice. round_robin lets a retry reach another replica where the name has several.
SERVICE_CONFIG = {
    "loadBalancingConfig": [{"round_robin": {}}],
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
}
MAX_RECEIVE_BYTES = 32 * 1024 * 1024  # grpc's own 4 MiB are too few for the log-probabilities of a long prompt
KEEPALIVE_SECONDS = 60  # a request may wait in silence; a peer that is gone must not make it wait for ever


Timeout: TypeAlias = float | Literal["client"] | None


class CallOptions(TypedDict, total=False):
    """Options that every method takes besides its own."""

    timeout: Timeout
    """Seconds until DeadlineExceeded. "client": as the client was made with. None: no limit."""
    routing_key: str | None
    """Key of requests that go to the same target of a route, and to the same replica. None: to any."""
    metadata: Mapping[str, str] | None
    """Further metadata, such as x-request-id or traceparent. None: no metadata."""
    wait_for_ready: bool
    """Whether to wait for a server that is not up yet, instead of failing with Unavailable."""


CALL_DEFAULTS: CallOptions = {"timeout": "client", "routing_key": None, "metadata": None, "wait_for_ready": False}


def call_options(arguments: Mapping[str, Any]) -> CallOptions:
    """Pick those of a method's arguments that are CallOptions."""
    return cast(CallOptions, {name: value for name, value in arguments.items() if name in CallOptions.__annotations__})


@dataclass(frozen=True, slots=True)
class Connection:
    """Address of a server, and who calls it."""

    address: str  # "host:port", or any name that gRPC resolves, such as "dns:///loraplex:50051" or "unix:/run/x.sock"
    credentials: grpc.ChannelCredentials | None = None  # from grpc.ssl_channel_credentials(). None: no TLS
    token: str | Callable[[], str] | None = None  # a function is called before every call. None: no token
    tenant: str | None = None  # the tenant to act for, if the token is trusted with several. None: the token's
    timeout: float | None = None  # seconds, for calls that do not say otherwise. None: no limit
    options: Mapping[str, str | int] = field(default_factory=dict)  # further gRPC channel options

    def open(self) -> grpc.Channel:
        """Open a channel; the first call connects it."""
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options=self.channel_options())
        return grpc.secure_channel(self.address, self.credentials, options=self.channel_options())

    def open_async(self) -> AsyncChannel:
        """Open a channel for the event loop that is running. Raises RuntimeError where none is running."""
        loop = asyncio.get_running_loop()
        if self.credentials is None:
            channel = grpc.aio.insecure_channel(self.address, options=self.channel_options())
        else:
            channel = grpc.aio.secure_channel(self.address, self.credentials, options=self.channel_options())
        return AsyncChannel(channel, loop)

    def arguments(self, given: CallOptions) -> dict[str, Any]:
        """Return the keyword arguments of one gRPC call."""
        call: CallOptions = {**CALL_DEFAULTS, **given}
        metadata = dict(call["metadata"] or {})
        if self.token is not None:
            metadata["authorization"] = f"Bearer {self.token if isinstance(self.token, str) else self.token()}"
        if self.tenant is not None:
            metadata["loraplex-tenant"] = self.tenant
        if call["routing_key"] is not None:
            metadata["loraplex-routing-key"] = call["routing_key"]
        return {
            "timeout": self.timeout if call["timeout"] == "client" else call["timeout"],
            "metadata": tuple(metadata.items()),
            "wait_for_ready": call["wait_for_ready"],
        }

    def channel_options(self) -> list[tuple[str, Any]]:
        """Return gRPC's own settings of the channel."""
        defaults: dict[str, str | int] = {
            "grpc.service_config": json.dumps(SERVICE_CONFIG),
            "grpc.max_receive_message_length": MAX_RECEIVE_BYTES,
            "grpc.keepalive_time_ms": KEEPALIVE_SECONDS * 1000,
        }
        return list({**defaults, **self.options}.items())
