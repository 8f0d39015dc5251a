"""Tensors of one value: reading those of a request, and those of an answer."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraplex_service.dialect_stubs.kserve_v2_pb2 import (
    InferParameter,
    ModelInferRequest,
    ModelInferResponse,
    ModelRepositoryParameter,
)
from loraplex_service.errors import FeatureUnsupported, InvalidRequest

INPUTS: Mapping[str, tuple[str, bool]] = {  # datatype, and whether it may be left out
    "text_input": ("BYTES", False),
    "stream": ("BOOL", True),
    "sampling_parameters": ("BYTES", True),
    "exclude_input_in_output": ("BOOL", True),
    "return_finish_reason": ("BOOL", True),
    "return_cumulative_logprob": ("BOOL", True),
    "return_logprobs": ("BOOL", True),
    "return_num_input_tokens": ("BOOL", True),
    "return_num_output_tokens": ("BOOL", True),
}
OUTPUTS: Mapping[str, str] = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "logprobs": "BYTES",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}
_NOT_SCHEDULED = "is not taken here; sampling_parameters have a priority, calls a deadline. Leave it out"
_FORMATS = {"FP32": "<f", "UINT32": "<I"}
_EMPTY_RESPONSE = "triton_enable_empty_final_response"
FINAL = "triton_final_response"
# Parameters of a request that Triton itself reads.
_SCHEDULING = ("priority", "timeout", "sequence_id", "sequence_start", "sequence_end")


@dataclass(slots=True)
class Asked:
    """The inputs of a request, and which outputs it wants."""

    text: str = ""
    stream: bool = False
    sampling_parameters: str = "{}"
    parameters: dict[str, object] = field(default_factory=dict)  # those of the request, which mean the same
    excludes_input: bool | None = None  # None: it does not say
    outputs: list[str] = field(default_factory=list)
    says_the_end: bool = False  # whether each response says if it is the last, and an empty one is


def asked_of(request: ModelInferRequest) -> Asked:
    """What a request asks for. Raises InvalidRequest, FeatureUnsupported."""
    values = _values(request)
    if "text_input" not in values:
        raise InvalidRequest.at("inputs", "text_input is required: a text, as BYTES of shape [1]")
    asked = Asked(
        text=_text(values["text_input"], "text_input"),
        stream=bool(values.get("stream", False)),
        sampling_parameters=_text(values.get("sampling_parameters", b"{}"), "sampling_parameters"),
        parameters=_parameters(request.parameters),
        excludes_input=None if "exclude_input_in_output" not in values else bool(values["exclude_input_in_output"]),
        says_the_end=_says_the_end(request.parameters),
    )
    asked.outputs = ["text_output", *(name for name in OUTPUTS if values.get(f"return_{name}"))]
    if request.outputs:
        asked.outputs = [_output(output) for output in request.outputs]
    if asked.stream and asked.excludes_input is False:
        raise FeatureUnsupported("exclude_input_in_output", "a stream has what is new alone; leave it out, or true")
    return asked


def _values(request: ModelInferRequest) -> dict[str, bytes | bool]:
    """The value of each input. Raises InvalidRequest."""
    if request.raw_input_contents and len(request.raw_input_contents) != len(request.inputs):
        problem = f"has {len(request.raw_input_contents)} entries for {len(request.inputs)} inputs; give one for each"
        raise InvalidRequest.at("raw_input_contents", problem)
    values: dict[str, bytes | bool] = {}
    for position, tensor in enumerate(request.inputs):
        _check(tensor, position, values)
        raw = request.raw_input_contents[position] if request.raw_input_contents else None
        values[tensor.name] = _value(tensor, raw)
    return values


def _check(tensor: ModelInferRequest.InferInputTensor, position: int, before: Mapping[str, object]) -> None:
    where = f"inputs[{position}]"
    if tensor.name not in INPUTS:
        problem = f"{tensor.name!r} is not an input of this server; there are {', '.join(INPUTS)}"
        raise FeatureUnsupported(f"{where}.name", problem)
    if tensor.name in before:
        raise InvalidRequest.at(f"{where}.name", f"{tensor.name!r} is given twice")
    datatype, _ = INPUTS[tensor.name]
    if tensor.datatype != datatype:
        raise InvalidRequest.at(f"{where}.datatype", f"is {tensor.datatype!r}; {tensor.name} is {datatype}")
    if not tensor.shape or any(size != 1 for size in tensor.shape):
        raise InvalidRequest.at(f"{where}.shape", f"must be [1]: a request has one {tensor.name}")
    for name in tensor.parameters:
        raise FeatureUnsupported(f"{where}.parameters[{name[:100]}]", "tensors have no parameters here; leave it out")


def _value(tensor: ModelInferRequest.InferInputTensor, raw: bytes | None) -> bytes | bool:
    """The one value of a tensor, among the raw contents or its own. Raises InvalidRequest."""
    if raw is not None:
        if tensor.HasField("contents"):
            raise InvalidRequest.at(tensor.name, "has contents beside raw_input_contents; give one of them")
        return _raw_bool(tensor.name, raw) if tensor.datatype == "BOOL" else _raw_bytes(tensor.name, raw)
    found: list[bytes] | list[bool] = list(tensor.contents.bytes_contents)
    others: list[bytes] | list[bool] = list(tensor.contents.bool_contents)
    if tensor.datatype == "BOOL":
        found, others = others, found
    if len(found) != 1 or others:
        kind = "bool_contents" if tensor.datatype == "BOOL" else "bytes_contents"
        raise InvalidRequest.at(tensor.name, f"must have one value, in contents.{kind} or raw_input_contents")
    return found[0]


def _raw_bool(name: str, raw: bytes) -> bool:
    if raw not in (b"\0", b"\1"):
        raise InvalidRequest.at(name, f"has {len(raw)} raw bytes; a BOOL is one, 0 or 1")
    return raw == b"\1"


def _raw_bytes(name: str, raw: bytes) -> bytes:
    if len(raw) < 4 or struct.unpack_from("<I", raw)[0] != len(raw) - 4:
        raise InvalidRequest.at(name, "must be the number of its bytes, in 4 bytes with the lowest first, and these")
    return raw[4:]


def _text(value: bytes | bool, name: str) -> str:
    try:
        return bytes(value).decode() if isinstance(value, bytes) else ""
    except UnicodeDecodeError as error:
        raise InvalidRequest.at(name, f"is no UTF-8: {error.reason} at byte {error.start}") from None


def _says_the_end(parameters: Mapping[str, InferParameter]) -> bool:
    """Whether the request wants an empty last response. Raises InvalidRequest."""
    if _EMPTY_RESPONSE not in parameters:
        return False
    value = parameters[_EMPTY_RESPONSE]
    check_kind(value, "bool_param", _EMPTY_RESPONSE)
    return value.bool_param


def _parameters(given: Mapping[str, InferParameter]) -> dict[str, object]:
    """What a request says of its generation beside the tensors. Raises InvalidRequest, FeatureUnsupported."""
    found: dict[str, object] = {}
    for name, value in given.items():
        if name in _SCHEDULING:
            raise FeatureUnsupported(f"parameters[{name}]", _NOT_SCHEDULED)
        kind = value.WhichOneof("parameter_choice")
        if kind is None:
            raise InvalidRequest.at(f"parameters[{name[:100]}]", "has no value; give one, or leave it out")
        if name != _EMPTY_RESPONSE:
            found[name] = getattr(value, kind)
    return found


def check_kind(value: InferParameter | ModelRepositoryParameter, kind: str, name: str) -> None:
    """Raise InvalidRequest for a parameter whose value is of another kind."""
    if value.WhichOneof("parameter_choice") != kind:
        raise InvalidRequest.at(f"parameters[{name}]", f"must be a {kind}")


def _output(output: ModelInferRequest.InferRequestedOutputTensor) -> str:
    if output.name not in OUTPUTS:
        problem = f"{output.name!r} is not an output of this server; there are {', '.join(OUTPUTS)}"
        raise FeatureUnsupported("outputs", problem)
    for name, value in output.parameters.items():
        if name == "classification" and value.WhichOneof("parameter_choice") == "int64_param" and not value.int64_param:
            continue  # tritonclient's way to say that there is none
        raise FeatureUnsupported(f"outputs.parameters[{name[:100]}]", "outputs have no parameters here; leave it out")
    return output.name


def add_output(response: ModelInferResponse, name: str, values: list[str] | list[float] | list[int]) -> None:
    """Add a tensor to an answer."""
    datatype = OUTPUTS[name]
    response.outputs.append(ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=[len(values)]))
    response.raw_output_contents.append(b"".join(_raw(value, datatype) for value in values))


def _raw(value: str | float, datatype: str) -> bytes:
    if isinstance(value, str):
        content = value.encode()
        return struct.pack("<I", len(content)) + content
    return struct.pack(_FORMATS[datatype], value)
