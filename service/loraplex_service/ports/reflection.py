"""Server reflection, as v1 and as v1alpha, which differ only in their package: clients use either.

grpcio-reflection has v1alpha; its servicer serves both.
"""

from __future__ import annotations  # grpc's classes are generic to mypy, and not when they run

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

from loraplex_service.dialect_stubs.pool import POOL

V1ALPHA = reflection.SERVICE_NAME
V1 = V1ALPHA.replace("v1alpha", "v1")


def add_reflection(names: Sequence[str], server: Any) -> None:
    """Add reflection to a server. `names`: the services that it lists, besides itself."""
    _describe_v1()
    servicer = reflection.aio.ReflectionServicer([*names, V1, V1ALPHA], _Pools())
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers = [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler}) for name in (V1, V1ALPHA)]
    server.add_generic_rpc_handlers(handlers)


class _Pools:
    """The pool of the contract and, for what it does not have, that of the dialects."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def find(*arguments: Any) -> Any:
            try:
                return getattr(descriptor_pool.Default(), name)(*arguments)
            except KeyError:
                return getattr(POOL, name)(*arguments)

        return find


def _describe_v1() -> None:
    """Add v1 to the descriptor pool, so that clients that list services can describe it."""
    file = FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file).replace("v1alpha", "v1")
    descriptor_pool.Default().Add(text_format.Parse(text, FileDescriptorProto()))
