"""A caller of its own process, to be killed in the middle of its call."""

from contextlib import suppress

import grpc

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex.v1.inference_pb2 import BatchGenerateRequest, GenerateRequest, StreamGenerateRequest
from loraplex.v1.inference_pb2_grpc import InferenceServiceStub


def call(address: str, method: str, spec_bytes: bytes) -> None:
    """Make one call and read what comes, until killed."""
    spec = GenerateSpec.FromString(spec_bytes)
    with grpc.insecure_channel(address) as channel, suppress(grpc.RpcError):
        stub = InferenceServiceStub(channel)
        if method == "unary":
            stub.Generate(GenerateRequest(spec=spec))
        elif method == "stream":
            list(stub.StreamGenerate(StreamGenerateRequest(spec=spec)))
        else:
            list(stub.BatchGenerate(BatchGenerateRequest(specs=[spec, spec])))
