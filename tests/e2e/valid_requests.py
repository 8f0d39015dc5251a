"""A valid request of every method of the contract, for the server of the other tests."""

from collections.abc import Iterator, Sequence
from typing import Any

from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from loraplex.operations import adapters
from loraplex.v1 import adapters_pb2, inference_pb2, models_pb2, pooling_pb2, routes_pb2, server_pb2, tokenizer_pb2
from tests.e2e.conftest import DEMO, SPARE

DATA = (inference_pb2, pooling_pb2, tokenizer_pb2)
ADMIN = (adapters_pb2, models_pb2, routes_pb2, server_pb2)
SHARED = "tenants/shared"
PIRATE, DOOMED = f"{SHARED}/adapters/pirate", "doomed"
ROUTE, DOOMED_ROUTE = f"{SHARED}/routes/main", f"{SHARED}/routes/{DOOMED}"
TARGETS = [{"model": "pirate", "weight": 1}]
PROMPT = {"text": "A fox"}
SPEC = {"model": "storyteller", "prompt": PROMPT, "stopping": {"max_tokens": 2}}
WAIT = {"seconds": 20}
CREATE = {"parent": SHARED, "adapter_id": "made", "adapter": {"base_model": "models/storyteller", "source": "pirate"}}

REQUESTS: dict[str, dict[str, Any]] = {
    "Generate": {"spec": SPEC},
    "StreamGenerate": {"spec": SPEC},
    "BatchGenerate": {"specs": [SPEC]},
    "Score": {"spec": {"model": "storyteller", "prompt": PROMPT}, "candidates": [{"text": " ran"}]},
    "CancelGeneration": {"request_ids": ["a"]},
    "Embed": {"model": "storyteller", "prompts": [PROMPT]},
    "Classify": {"model": "judge", "prompts": [PROMPT]},
    "Rerank": {"model": "judge", "query": "Who?", "documents": ["A fox"]},
    "Tokenize": {"model": "storyteller", "prompt": PROMPT},
    "Detokenize": {"model": "storyteller", "token_ids": [65]},
    "GetAdapter": {"name": PIRATE},
    "ListAdapters": {"parent": SHARED},
    "WatchAdapters": {"parent": SHARED},
    "CreateAdapter": CREATE | {"validate_only": True},
    "UpdateAdapter": {"adapter": {"name": PIRATE, "labels": {"a": "b"}}, "update_mask": {"paths": ["labels"]}},
    "DeleteAdapter": {"name": f"{SHARED}/adapters/{DOOMED}", "wait": WAIT},
    "LoadAdapter": {"name": PIRATE, "wait": WAIT},
    "UnloadAdapter": {"name": PIRATE, "wait": WAIT},
    "GetRoute": {"name": ROUTE},
    "ListRoutes": {"parent": SHARED},
    "ResolveTarget": {"parent": SHARED, "model": "pirate"},
    "UpdateRoute": {"route": {"name": ROUTE, "targets": TARGETS}},
    "DeleteRoute": {"name": DOOMED_ROUTE},
    "GetModel": {"name": "models/storyteller"},
    "ListModels": {},
    "WatchModels": {},
    "LoadModel": {"name": "models/storyteller"},
    "UnloadModel": {"name": f"models/{SPARE}"},
    "GetServerInfo": {},
    "WatchLoad": {"interval": {"nanos": 200_000_000}},
    "WatchUsage": {},
}


def methods() -> Iterator[tuple[MethodDescriptor, bool]]:
    """Every method of the contract, and whether it is on the data port."""
    for module in (*DATA, *ADMIN):
        for service in module.DESCRIPTOR.services_by_name.values():
            yield from ((method, module in DATA) for method in service.methods)


def valid_requests(method: MethodDescriptor) -> Sequence[Message]:
    """What a caller sends: one message, or the stream of an upload."""
    if method.name == "UploadAdapter":
        operation = adapters.upload_adapter(
            "made", base_model="storyteller", directory=DEMO / "adapters" / "pirate", validate_only=True
        )
        return list(operation.requests)
    return [GetMessageClass(method.input_type)(**REQUESTS[method.name])]
