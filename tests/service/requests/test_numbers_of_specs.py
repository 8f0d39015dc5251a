"""Every floating-point field of GenerateSpec, at the ends of what a number can be: refused by its path, or a token is
drawn that the logits allow."""

import math
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
import torch
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex_engine.execution.arrays import History
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.scheduling.request import Request
from loraplex_kernels.reference import ReferenceOps
from tests.engine.drawn import drawn
from tests.service.data_plane import DataPlane, make_spec

FLOATS = (FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT)
ENDS = [math.nan, math.inf, 0.0, 5e-324, 1e-45, 1e-38, 1e-30, 1e-6, 0.5, 1.0, 2.0, 9.99, 100.0, 1e30, 3e38, 1e308]
VALUES = [*ENDS, *(-value for value in ENDS)]


def floats_of(kind: Descriptor, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for field in kind.fields:
        here = (*path, field.name)
        if field.message_type is None:
            if field.cpp_type in FLOATS:
                yield here
        elif field.message_type.GetOptions().map_entry:
            if field.message_type.fields_by_name["value"].cpp_type in FLOATS:
                yield (*here, "5")
        elif field.message_type.file.package == kind.file.package and kind.full_name != field.message_type.full_name:
            yield from floats_of(field.message_type, here)


# What is required beside a number.
BESIDE: dict[str, dict[str, Any]] = {"beam_search": {"num_beams": 2}, "watermark": {"key": b"k" * 16}}
PATHS = list(floats_of(GenerateSpec.DESCRIPTOR))


def with_number(path: tuple[str, ...], value: float) -> GenerateSpec:
    fields: dict[str, Any] = {name: fields for name, fields in BESIDE.items() if name == path[0]}
    spec = make_spec(**fields)
    message: Any = spec
    *parents, name = path
    for parent in parents:
        message = getattr(message, parent)
    if name == "5":
        message[5] = value
    else:
        setattr(message, name, value)
    return spec


def test_the_walk_finds_the_fields() -> None:
    assert {("sampling", "temperature"), ("sampling", "typical_p"), ("sampling", "logit_bias", "5")} <= set(PATHS)


@pytest.mark.parametrize("path", PATHS, ids=".".join)
async def test_each_number_is_refused_by_its_path_or_harmless(plane: DataPlane, path: tuple[str, ...]) -> None:
    where = "spec." + ".".join(path).replace(".5", "[5]")
    refusals = [await refusal(plane, with_number(path, value)) for value in VALUES]
    assert all(message is None or message.startswith(f"{where}: ") for message in refusals), refusals
    assert all(message for value, message in zip(VALUES, refusals, strict=True) if not math.isfinite(value))
    assert None in refusals


async def refusal(plane: DataPlane, spec: GenerateSpec) -> str | None:
    """Why the caller cannot have that; None: what the engine was given draws as it should."""
    plane.engine.requests.clear()
    try:
        await plane.generate(spec)
    except grpc.aio.AioRpcError as error:
        return error.details() if error.code() is grpc.StatusCode.INVALID_ARGUMENT else repr(error)
    check_draws(plane.engine.requests[0])
    return None


def check_draws(message: AddRequest) -> None:
    """Some tokens are likely, among them such as the output has already; all others are out of the question."""
    logits = torch.full((1, 258), -400.0)
    logits[0, [5, 6, 97, 98]] = torch.tensor([30.0, 30.0, 25.0, -25.0])
    for seed in range(3):
        request = Request(message, 1, now=0.0)
        request.token_ids += [97, 5][:seed]
        (token,) = drawn(ReferenceOps(torch.device("cpu")), logits.clone(), [History.of(request)])
        assert token is not None
        assert token.token_id in (5, 6, 97, 98)
        assert token.logprobs is None or math.isfinite(token.logprobs.logprob)
