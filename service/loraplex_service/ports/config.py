"""The part of the configuration that says how the ports are encrypted, what they speak and what they take."""

from typing import ClassVar

import msgspec

from loraplex_engine.link.bounds import AT_LEAST_1, Bounds

DIALECTS = ("kserve_v2", "vllm", "openengine")  # what the data port may speak beside the contract
OF_GRPC = Bounds(1, 1 << 30)  # its options are of 32 bits


class TlsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Files in PEM. With `client_ca`, callers must show a certificate that it signed."""

    certificate: str  # of the server; a new one is used without a restart
    key: str  # of that certificate
    client_ca: str | None = None  # the authority of callers' certificates. Left out: they are asked for none


class LimitsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits on requests in flight, on message sizes, and on waiting times."""

    BOUNDS: ClassVar[dict[str, Bounds]] = {
        "answer_bytes": OF_GRPC,
        "request_bytes": OF_GRPC,
        "batch_bytes": OF_GRPC,
        "calls_per_tenant": OF_GRPC,
        "calls_per_connection": OF_GRPC,
        "connections": OF_GRPC,
        "template_workers": AT_LEAST_1,
    }

    in_flight_sequences: float = 4.0  # times `max_num_seqs`: beyond it requests are refused as OVERLOADED
    # times the tokens that the key-value cache holds: beyond it requests are refused as OVERLOADED
    in_flight_cache_tokens: float = 4.0
    expected_output_tokens: int = 512  # an output counts as at most so many tokens: few use all that they ask for
    unread_tokens: int = 8192  # unread tokens of a stream: beyond it the stream ends as SLOW_CONSUMER
    # time for which a message of a stream may stay unread, before the stream ends as SLOW_CONSUMER
    unread_seconds: float = 30.0
    # unread answers of one tenant, beyond 16 KiB each: then the next one ends as SLOW_CONSUMER
    unread_bytes: int = 256 << 20
    answer_bytes: int = 32 << 20  # the answer to a unary call; a larger one ends as MESSAGE_TOO_LARGE: use a stream
    # a request of the data port, decompressed; a larger one is refused as MESSAGE_TOO_LARGE
    request_bytes: int = 4 << 20
    batch_bytes: int = 8 << 20  # a request of BatchGenerate: the same
    message_seconds: float = 30.0  # time for a call to send its message, or the next one of an upload
    calls_per_tenant: int = 2048  # calls in progress on one port: beyond it calls are refused as OVERLOADED
    # calls in progress on one connection. gRPC clients with one connection silently delay further ones. See
    # docs/configuration.md#many-calls-from-one-program
    calls_per_connection: int = 64
    # connections to one port: further ones are closed at once. `loraplex serve` raises its limit of open files for
    # them, and logs if the system does not allow it
    connections: int = 1024
    # time without a call after which a connection is closed; clients open another when they need it
    idle_connection_seconds: float = 300.0
    # the longest wait of a request for a cold adapter: until it is read, and then for room on the device
    adapter_load_wait_seconds: float = 60.0
    template_workers: int = 2  # processes that render chat templates
    # long texts that are tokenised or rendered, or wait for it: beyond it requests are refused as OVERLOADED
    waiting_text_bytes: int = 32 << 20
    upload_bytes: int = 2 << 30  # the files of one uploaded or fetched adapter
