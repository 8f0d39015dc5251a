"""Messages made to hurt, sent to a server that asks for credentials, by those who have none and by those who have."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from loraplex_service.ports.receiving import ReceiveLimits
from tests.service.ports.guarded import Guarded, Strain, guarded_server

BATCH = "/loraplex.v1.InferenceService/BatchGenerate"
EMPTY_SPEC = b"\x0a\x00"
MOST_BYTES = 64 << 20
MOST_HELD_MS = 50.0
RECEIVE = ReceiveLimits()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, byte_tokenizer_directory: Path) -> Iterator[Guarded]:
    with guarded_server(tmp_path_factory.mktemp("guarded"), byte_tokenizer_directory) as server:
        send(server, b"", token=None)  # what is loaded with the first call is loaded
        send(server, b"", token=server.loud)
        yield server


def send(server: Guarded, data: bytes, token: str | None, gzip: bool = False) -> tuple[grpc.StatusCode, str]:
    """The status of a BatchGenerate with this message."""
    compression = grpc.Compression.Gzip if gzip else None
    with grpc.insecure_channel(server.address, options=[("grpc.max_send_message_length", -1)]) as channel:
        batch: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(BATCH)
        call = batch(data, metadata=server.credentials(token), compression=compression, timeout=60)
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
        return raised.value.code(), raised.value.details() or ""


def is_bearable(strain: Strain) -> bool:
    return strain.peak_bytes <= MOST_BYTES and strain.held_ms <= MOST_HELD_MS


@pytest.mark.parametrize("gzip", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("megabytes", [1, 8, 32])
def test_no_message_costs_anything_without_credentials(server: Guarded, megabytes: int, gzip: bool) -> None:
    with server.strain() as strain:
        code, _ = send(server, EMPTY_SPEC * (megabytes << 19), token=None, gzip=gzip)
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert is_bearable(strain), strain


@pytest.mark.parametrize("gzip", [False, True], ids=["plain", "gzip"])
def test_messages_of_millions_of_messages_are_refused_while_they_are_bytes(server: Guarded, gzip: bool) -> None:
    with server.strain() as strain:
        code, problem = send(server, EMPTY_SPEC * (RECEIVE.batch_bytes // 2), server.loud, gzip)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "fields in all" in problem
    assert strain.peak_bytes <= MOST_BYTES + 2 * RECEIVE.batch_bytes  # as they came, and once as bytes of Python


def test_what_gzip_opens_to_is_not_opened_beyond_the_limit(server: Guarded) -> None:
    with server.strain() as strain:
        code, _ = send(server, bytes(512 << 20), server.loud, gzip=True)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert strain.peak_bytes <= MOST_BYTES + RECEIVE.batch_bytes
