"""How a client reaches a server: address, credentials, retries, what accompanies every call."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

import grpc
import grpc.aio

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


class CallOptions(TypedDict, total=False):
    """What every method takes besides its own arguments."""

    timeout: float | None  # seconds; past it the call fails with DeadlineExceeded. Absent: the client's own timeout
    routing_key: str | None  # requests with the same key go to the same target of a route, and to the same replica
    metadata: Mapping[str, str]  # further metadata, such as x-request-id or traceparent
    wait_for_ready: bool  # wait for a server that is not up yet, instead of failing with Unavailable


def call_options(arguments: Mapping[str, Any]) -> CallOptions:
    """Those of a method's arguments that are CallOptions."""
    return cast(CallOptions, {name: value for name, value in arguments.items() if name in CallOptions.__annotations__})


@dataclass(frozen=True, slots=True)
class Connection:
    """Where the server is, and who calls it."""

    address: str  # "host:port", or any name that gRPC resolves, such as "dns:///loraplex:50051" or "unix:/run/x.sock"
    credentials: grpc.ChannelCredentials | None = None  # from grpc.ssl_channel_credentials(); None is plaintext
    token: str | Callable[[], str] | None = None  # bearer token; a function is asked before every call
    tenant: str | None = None  # the tenant to act for, if the token is trusted with more than one
    timeout: float | None = None  # seconds, for calls that do not say otherwise; None is no limit
    options: Mapping[str, str | int] = field(default_factory=dict)  # further gRPC channel options

    def open(self) -> grpc.Channel:
        if self.credentials is None:
            return grpc.insecure_channel(self.address, options=self.channel_options())
        return grpc.secure_channel(self.address, self.credentials, options=self.channel_options())

    def open_async(self) -> grpc.aio.Channel:
        if self.credentials is None:
            return grpc.aio.insecure_channel(self.address, options=self.channel_options())
        return grpc.aio.secure_channel(self.address, self.credentials, options=self.channel_options())

    def arguments(self, call: CallOptions) -> dict[str, Any]:
        """The keyword arguments of one gRPC call."""
        metadata = dict(call.get("metadata", {}))
        if self.token is not None:
            metadata["authorization"] = f"Bearer {self.token if isinstance(self.token, str) else self.token()}"
        if self.tenant is not None:
            metadata["loraplex-tenant"] = self.tenant
        if (routing_key := call.get("routing_key")) is not None:
            metadata["loraplex-routing-key"] = routing_key
        return {
            "timeout": call.get("timeout", self.timeout),
            "metadata": tuple(metadata.items()),
            "wait_for_ready": call.get("wait_for_ready", False),
        }

    def channel_options(self) -> list[tuple[str, Any]]:
        """gRPC's own settings of the channel."""
        defaults: dict[str, str | int] = {
            "grpc.service_config": json.dumps(SERVICE_CONFIG),
            "grpc.max_receive_message_length": MAX_RECEIVE_BYTES,
            "grpc.keepalive_time_ms": KEEPALIVE_SECONDS * 1000,
        }
        return list({**defaults, **self.options}.items())
