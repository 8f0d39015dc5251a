"""The limits of the messages of dialects, and what of them is always refused. Of the table in `limits` this is a part.

What their fields become has the limits of the contract besides. A field that is refused has none: nothing reads it.
"""

from collections.abc import Mapping
from functools import cache

from google.protobuf.descriptor import Descriptor

from loraplex_service.validation.limits import Entries, Limit, Text


@cache
def kind_of(message: Descriptor) -> str:
    """The name of a message in the tables: the bare one of the contract and of google's types, else the full name."""
    is_ours = message.file.package.startswith(("loraplex.", "google."))
    return message.name if is_ours else message.full_name


_NAME = Text(512)
_PARAMETERS = Entries(64, keys=Text(128))
_TEXT = Text((1 << 21) + 4, unit="bytes")  # a prompt, with its length before it

LIMITS: Mapping[str, Limit] = {
    # ---- kserve_v2.proto
    "inference.ModelReadyRequest.name": _NAME,
    "inference.ModelReadyRequest.version": _NAME,
    "inference.ModelMetadataRequest.name": _NAME,
    "inference.ModelMetadataRequest.version": _NAME,
    "inference.ModelConfigRequest.name": _NAME,
    "inference.ModelConfigRequest.version": _NAME,
    "inference.InferParameter.string_param": Text(8192),
    "inference.InferTensorContents.bool_contents": Entries(1),
    "inference.InferTensorContents.bytes_contents": Entries(1, _TEXT),
    "inference.ModelInferRequest.model_name": _NAME,
    "inference.ModelInferRequest.model_version": _NAME,
    "inference.ModelInferRequest.id": Text(128),
    "inference.ModelInferRequest.parameters": _PARAMETERS,
    "inference.ModelInferRequest.inputs": Entries(16),
    "inference.ModelInferRequest.outputs": Entries(16),
    "inference.ModelInferRequest.raw_input_contents": Entries(16, _TEXT),
    "inference.ModelInferRequest.InferInputTensor.name": Text(128),
    "inference.ModelInferRequest.InferInputTensor.datatype": Text(16),
    "inference.ModelInferRequest.InferInputTensor.shape": Entries(8),
    "inference.ModelInferRequest.InferInputTensor.parameters": _PARAMETERS,
    "inference.ModelInferRequest.InferRequestedOutputTensor.name": Text(128),
    "inference.ModelInferRequest.InferRequestedOutputTensor.parameters": _PARAMETERS,
    "inference.ModelRepositoryParameter.string_param": Text(8192),
    "inference.RepositoryModelLoadRequest.model_name": _NAME,
    "inference.RepositoryModelLoadRequest.parameters": _PARAMETERS,
    "inference.RepositoryModelUnloadRequest.model_name": _NAME,
    "inference.RepositoryModelUnloadRequest.parameters": _PARAMETERS,
}

_NUMBERS = "inputs are BYTES and BOOL; leave it out"
_REPOSITORY = "there is one repository; leave it out"

REFUSED: Mapping[str, str] = {
    # ---- kserve_v2.proto
    "inference.InferTensorContents.int_contents": _NUMBERS,
    "inference.InferTensorContents.int64_contents": _NUMBERS,
    "inference.InferTensorContents.uint_contents": _NUMBERS,
    "inference.InferTensorContents.uint64_contents": _NUMBERS,
    "inference.InferTensorContents.fp32_contents": _NUMBERS,
    "inference.InferTensorContents.fp64_contents": _NUMBERS,
    "inference.ModelRepositoryParameter.bytes_param": "files are not sent here: upload the adapter, or name its source",
    "inference.RepositoryIndexRequest.repository_name": _REPOSITORY,
    "inference.RepositoryModelLoadRequest.repository_name": _REPOSITORY,
    "inference.RepositoryModelUnloadRequest.repository_name": _REPOSITORY,
}
