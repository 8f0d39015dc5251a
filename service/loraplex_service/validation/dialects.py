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
_ID = Text(128)
_FORM = Text(65536, unit="bytes")
_CHOICES = Entries(256, _FORM)
_TOKENS = Entries(1 << 18)
_BIAS = Entries(1024)
_STOP = Entries(16, Text(256, unit="bytes"))
_STOP_TOKENS = Entries(64)
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
    # ---- vllm.proto
    "vllm.GenerateRequest.request_id": _ID,
    "vllm.GenerateRequest.model": _NAME,
    "vllm.GenerateRequest.text": _TEXT,
    "vllm.GenerateRequest.session_id": Text(8192),
    "vllm.GenerateRequest.lora_name": _NAME,
    "vllm.TokenIds.ids": _TOKENS,
    "vllm.DecodingParameters.logit_bias": _BIAS,
    "vllm.DecodingParameters.allowed_token_ids": _BIAS,
    "vllm.DecodingParameters.json": _FORM,
    "vllm.DecodingParameters.regex": _FORM,
    "vllm.DecodingParameters.grammar": _FORM,
    "vllm.DecodingParameters.StringChoices.choices": _CHOICES,
    "vllm.StoppingCriteria.stop_token_ids": _STOP_TOKENS,
    "vllm.StoppingCriteria.stop_strings": _STOP,
    "vllm.KVCacheParameters.cache_salt": _ID,
    "vllm.AbortRequest.request_ids": Entries(256, _ID),
    "vllm.LoadLoraRequest.lora_name": _NAME,
    "vllm.LoadLoraRequest.source_path": Text(8192),
    "vllm.UnloadLoraRequest.lora_name": _NAME,
    # ---- vllm_engine.proto
    "vllm.grpc.engine.GenerateRequest.request_id": _ID,
    "vllm.grpc.engine.GenerateRequest.text": _TEXT,
    "vllm.grpc.engine.TokenizedInput.original_text": _TEXT,
    "vllm.grpc.engine.TokenizedInput.input_ids": _TOKENS,
    "vllm.grpc.engine.SamplingParams.stop": _STOP,
    "vllm.grpc.engine.SamplingParams.stop_token_ids": _STOP_TOKENS,
    "vllm.grpc.engine.SamplingParams.logit_bias": _BIAS,
    "vllm.grpc.engine.SamplingParams.json_schema": _FORM,
    "vllm.grpc.engine.SamplingParams.regex": _FORM,
    "vllm.grpc.engine.SamplingParams.grammar": _FORM,
    "vllm.grpc.engine.ChoiceConstraint.choices": _CHOICES,
    "vllm.grpc.engine.EmbedRequest.request_id": _ID,
    "vllm.grpc.engine.AbortRequest.request_ids": Entries(256, _ID),
    "vllm.grpc.engine.GetLoadsRequest.include": Entries(16, Text(128)),
    # ---- openengine.proto
    "openengine.v1.GenerateRequest.request_id": _ID,
    "openengine.v1.GenerateRequest.model": _NAME,
    "openengine.v1.GenerateRequest.prompt": _TEXT,
    "openengine.v1.GenerateRequest.lora_name": _NAME,
    "openengine.v1.TokenIds.ids": _TOKENS,
    "openengine.v1.StoppingOptions.conditions": Entries(80),
    "openengine.v1.StopCondition.stop_text": Text(256, unit="bytes"),
    "openengine.v1.KvOptions.cache_salt": _ID,
    "openengine.v1.GuidedDecoding.json_schema": _FORM,
    "openengine.v1.GuidedDecoding.regex": _FORM,
    "openengine.v1.GuidedDecoding.ebnf_grammar": _FORM,
    "openengine.v1.ChoiceConstraint.choices": _CHOICES,
    "openengine.v1.GetModelInfoRequest.model": _NAME,
    "openengine.v1.HealthRequest.model": _NAME,
    "openengine.v1.AbortRequest.request_id": _ID,
    "openengine.v1.LoraAdapter.lora_name": _NAME,
    "openengine.v1.LoraAdapter.source_path": Text(8192),
    "openengine.v1.UnloadLoraRequest.lora_name": _NAME,
    "openengine.v1.GetKvEventSourcesRequest.data_parallel_ranks": Entries(64),
}

_NUMBERS = "inputs are BYTES and BOOL; leave it out"
_MEDIA = "there is text alone; leave it out"
_MOVED = "caches are not moved between servers; leave it out"
_TAG = "forms are JSON Schemas, regular expressions, grammars and choices; give one of them"
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
    # ---- vllm.proto
    "vllm.GenerateRequest.media": _MEDIA,
    "vllm.DecodingParameters.structural_tag": _TAG,
    "vllm.KVCacheParameters.kv_transfer_params": _MOVED,
    "vllm.KVCacheParameters.ec_transfer_params": _MOVED,
    # ---- vllm_engine.proto
    "vllm.grpc.engine.GenerateRequest.kv_transfer_params": _MOVED,
    "vllm.grpc.engine.GenerateRequest.kv_transfer_params_json": _MOVED,
    "vllm.grpc.engine.GenerateRequest.mm_inputs": _MEDIA,
    "vllm.grpc.engine.GenerateRequest.extra_mm_inputs": _MEDIA,
    "vllm.grpc.engine.GenerateRequest.media_refs": _MEDIA,
    "vllm.grpc.engine.SamplingParams.structural_tag": _TAG,
    # ---- openengine.proto
    "openengine.v1.GenerateRequest.media": _MEDIA,
    "openengine.v1.GenerateRequest.extra": "there is nothing beyond the fields; leave it out",
    "openengine.v1.CandidateTokenSelection.all": "all tokens of the vocabulary are not told: give top_n or token_ids",
    "openengine.v1.KvOptions.session": _MOVED,
    "openengine.v1.GuidedDecoding.structural_tag": _TAG,
    "openengine.v1.GuidedDecoding.backend": "there is one; leave it out",
    "openengine.v1.AbortRequest.kv_session": _MOVED,
    "openengine.v1.AbortRequest.all_requests": "generations are ended one by one, by their ids",
}
