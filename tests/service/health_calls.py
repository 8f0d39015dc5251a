"""Calls of gRPC's health service: the stubs that come with it carry no types."""

import grpc.aio
from google.protobuf.message import Message
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse


async def health_of(channel: grpc.aio.Channel, service: str = "") -> int:
    """The status of this service now. "": of the server as a whole."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
    )
    return (await check(HealthCheckRequest(service=service))).status


def watch_health(
    channel: grpc.aio.Channel, service: str = ""
) -> grpc.aio.UnaryStreamCall[Message, HealthCheckResponse]:
    """The status of this service, and every change of it until the call is cancelled."""
    watch = channel.unary_stream(
        "/grpc.health.v1.Health/Watch", HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
    )
    return watch(HealthCheckRequest(service=service))
