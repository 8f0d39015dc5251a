"""The admin port: the server itself, its load and its usage records."""

from typing import Unpack

from loraplex.channel import CallOptions
from loraplex.operations.base import Operation, StreamOperation, optional_duration
from loraplex.v1 import server_pb2


def get_server_info(**call: Unpack[CallOptions]) -> Operation[server_pb2.ServerInfo]:
    """Say what server this is: version, devices, limits."""
    request = server_pb2.GetServerInfoRequest()
    return Operation("/loraplex.v1.ServerService/GetServerInfo", request, server_pb2.ServerInfo, call)


def watch_load(
    *, interval: float | None = None, **call: Unpack[CallOptions]
) -> StreamOperation[server_pb2.WatchLoadResponse]:
    """Receive the server's load now, and then again at every interval.

    Args:
        interval: Seconds between two messages. None: 1.
    """
    request = server_pb2.WatchLoadRequest(interval=optional_duration(interval))
    return StreamOperation("/loraplex.v1.ServerService/WatchLoad", request, server_pb2.WatchLoadResponse, call)


def watch_usage(
    *, after_id: str = "", existing_only: bool = False, **call: Unpack[CallOptions]
) -> StreamOperation[server_pb2.WatchUsageResponse]:
    """Receive usage records in the order in which they were written, and then every new one.

    Args:
        after_id: Id of the record after which to begin. "": the oldest record that is kept.
        existing_only: Whether to end with the last record that there is, instead of waiting for more.
    """
    request = server_pb2.WatchUsageRequest(after_id=after_id, existing_only=existing_only)
    return StreamOperation("/loraplex.v1.ServerService/WatchUsage", request, server_pb2.WatchUsageResponse, call)
