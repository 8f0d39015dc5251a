"""The admin port: the server itself, its load and its usage records."""

from typing import Unpack

from loraplex.channel import CallOptions
from loraplex.operations.base import Operation, optional_duration
from loraplex.v1 import server_pb2


def get_server_info(**call: Unpack[CallOptions]) -> Operation[server_pb2.ServerInfo]:
    """What server this is."""
    request = server_pb2.GetServerInfoRequest()
    return Operation("/loraplex.v1.ServerService/GetServerInfo", request, server_pb2.ServerInfo, call)


def watch_load(
    *, interval: float | None = None, **call: Unpack[CallOptions]
) -> Operation[server_pb2.WatchLoadResponse]:
    """The server's load now, then again at every interval."""
    request = server_pb2.WatchLoadRequest(interval=optional_duration(interval))
    return Operation("/loraplex.v1.ServerService/WatchLoad", request, server_pb2.WatchLoadResponse, call)


def watch_usage(
    *, after_id: str = "", existing_only: bool = False, **call: Unpack[CallOptions]
) -> Operation[server_pb2.WatchUsageResponse]:
    """Usage records in the order in which they were written, after the one with this id, then every new one."""
    request = server_pb2.WatchUsageRequest(after_id=after_id, existing_only=existing_only)
    return Operation("/loraplex.v1.ServerService/WatchUsage", request, server_pb2.WatchUsageResponse, call)
