"""The public definition of engines behind gateways, from the package smg-grpc-proto, in an environment of its own."""

from pathlib import Path

import pytest

from loraplex_service.dialect_stubs import vllm_engine_pb2
from tests.service.control_plane import ControlPlane
from tests.service.http.clients.environments import environment, used

pytestmark = pytest.mark.slow

SCRIPT = r"""
import sys
import grpc
from google.protobuf import descriptor_pb2
from smg_grpc_proto import vllm_engine_pb2 as theirs, vllm_engine_pb2_grpc

address, file = sys.argv[1:]
ours = descriptor_pb2.FileDescriptorProto.FromString(open(file, "rb").read())
BYTES, MESSAGE = (descriptor_pb2.FieldDescriptorProto.Type.Value(name) for name in ("TYPE_BYTES", "TYPE_MESSAGE"))
for message in ours.message_type:
    public = theirs.DESCRIPTOR.message_types_by_name[message.name]
    for field in message.field:
        found = public.fields_by_name[field.name]
        assert found.number == field.number, (message.name, field.name)
        # What is refused is bytes here, whatever it holds.
        assert found.type == field.type or (found.type, field.type) == (MESSAGE, BYTES), (message.name, field.name)
        assert found.is_repeated == (field.label == 3), (message.name, field.name)
    untold = {field.name for field in public.fields} - {field.name for field in message.field}
    assert not untold or message.name.endswith(("Response", "Complete", "Load")), (message.name, untold)

stub = vllm_engine_pb2_grpc.VllmEngineStub(grpc.insecure_channel(address))
request = theirs.GenerateRequest(request_id="a", stream=True)
request.tokenized.input_ids.extend([97, 98])
request.sampling_params.max_tokens, request.sampling_params.temperature = 4, 0
request.sampling_params.logprobs = 1
metadata = (("loraplex-adapter", "pirate"),)
*chunks, last = stub.Generate(request, metadata=metadata)
assert last.complete.finish_reason == "length", last
assert [token for chunk in chunks for token in chunk.chunk.token_ids] == list(last.complete.output_ids)
assert stub.HealthCheck(theirs.HealthCheckRequest()).healthy
assert stub.GetModelInfo(theirs.GetModelInfoRequest(), metadata=metadata).vocab_size == 258
request.media_refs.items.add(url="https://somewhere")
try:
    list(stub.Generate(request, metadata=metadata))
except grpc.RpcError as error:
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED and "media_refs" in error.details(), error
else:
    raise AssertionError("media was passed over")
print("served")
"""


async def test_a_caller_with_the_public_definition_is_served(control: ControlPlane, tmp_path: Path) -> None:
    file = tmp_path / "ours.binpb"
    file.write_bytes(vllm_engine_pb2.DESCRIPTOR.serialized_pb)
    python = environment(tmp_path / "env", "smg-grpc-proto")
    assert "served" in await used(python, SCRIPT, control.addresses.data, str(file))
