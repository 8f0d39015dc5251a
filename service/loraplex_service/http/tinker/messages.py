"""Samples as Tinker's clients read them: a message of theirs, in a pool of its own, where its names meet no others."""

from array import array
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from loraplex.v1.inference_pb2 import FinishReason, GenerateOutput, GenerateResponse, TokenLogprob

MEDIA_TYPE = "application/x-protobuf"
_PACKAGE = "tinker_public"
_NOTHING = -99999.0  # the log-probability of a place among the likeliest that is empty
_STOPPED, _LENGTH = 0, 1  # STOP_REASON_…: numbers of its enumeration
_ENDS = (FinishReason.FINISH_REASON_STOP, FinishReason.FINISH_REASON_EOS, FinishReason.FINISH_REASON_TOOL_CALLS)

_BYTES, _INT32, _UINT32 = (
    FieldDescriptorProto.TYPE_BYTES,
    FieldDescriptorProto.TYPE_INT32,
    FieldDescriptorProto.TYPE_UINT32,
)
_FIELDS: dict[str, list[tuple[str, int, int | str]]] = {  # name, number, and type: a message by its name
    "TopkLogprobs": [("token_ids", 1, _BYTES), ("logprobs", 2, _BYTES), ("k", 3, _UINT32), ("length", 4, _UINT32)],
    "SampledSequence": [
        ("stop_reason", 1, _INT32),
        ("tokens", 2, _BYTES),
        ("logprobs", 3, _BYTES),
        ("topk_sampled_logprobs", 4, "TopkLogprobs"),
    ],
    "SampleResponse": [
        ("sequences", 1, "SampledSequence"),
        ("prompt_logprobs", 2, _BYTES),
        ("topk_prompt_logprobs", 3, "TopkLogprobs"),
        ("prompt_cache_hit_tokens", 4, _INT32),
    ],
}


def _classes() -> dict[str, Any]:
    file = FileDescriptorProto(name=f"{_PACKAGE}.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            made = message.field.add(name=field, number=number, label=FieldDescriptorProto.LABEL_OPTIONAL)
            if isinstance(kind, str):
                made.type, made.type_name = FieldDescriptorProto.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
            else:
                made.type = FieldDescriptorProto.Type.ValueType(kind)
            if field == "sequences":
                made.label = FieldDescriptorProto.LABEL_REPEATED
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _FIELDS}


_CLASSES = _classes()


def sample_response(
    response: GenerateResponse, top: int = 0, with_prompt: bool = False, top_prompt: int = 0, last: int | None = None
) -> bytes:
    """The samples. `top`, `top_prompt`: how many of the likeliest tokens were asked for in each place; 0: none.

    `last`: of the prompt only so many tokens have log-probabilities; None: all.
    """
    message = _CLASSES["SampleResponse"](prompt_cache_hit_tokens=response.usage.cached_prompt_tokens)
    for output in response.outputs:
        message.sequences.append(_sequence(output, top))
    prompt = response.prompt_logprobs
    hidden = 0 if last is None else max(0, len(prompt) - last)
    if with_prompt:
        message.prompt_logprobs = _floats([float("nan")] * hidden + [_logprob(token) for token in prompt[hidden:]])
    if top_prompt:
        message.topk_prompt_logprobs.CopyFrom(_likeliest(prompt, top_prompt, hidden))
    return bytes(message.SerializeToString())


def _sequence(output: GenerateOutput, top: int) -> Any:
    sequence = _CLASSES["SampledSequence"](
        stop_reason=_STOPPED if output.finished.reason in _ENDS else _LENGTH,
        tokens=array("i", output.token_ids).tobytes(),
        logprobs=_floats([_logprob(token) for token in output.logprobs]),
    )
    if top:
        sequence.topk_sampled_logprobs.CopyFrom(_likeliest(output.logprobs, top, 0))
    return sequence


def _likeliest(tokens: Sequence[TokenLogprob], most: int, hidden: int) -> Any:
    """The likeliest tokens of each place, as a matrix that is filled up. `hidden`: places in front without any."""
    ids, logprobs = array("i"), array("f")
    for place, token in enumerate(tokens):
        shown = token.top[:most] if place >= hidden else ()
        missing = most - len(shown)
        ids.extend([*(top.token_id for top in shown), *[0] * missing])
        logprobs.extend([*(top.logprob for top in shown), *[_NOTHING] * missing])
    return _CLASSES["TopkLogprobs"](token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=most, length=len(tokens))


def _logprob(token: TokenLogprob) -> float:
    return token.logprob if token.HasField("logprob") else float("nan")


def _floats(values: Sequence[float]) -> bytes:
    return array("f", values).tobytes()
