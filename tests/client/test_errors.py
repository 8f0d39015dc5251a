"""Errors decoded from statuses and their details."""

import pickle
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

import loraplex
from loraplex.errors import LoraplexError, Violation, from_call, from_status, raise_for_error, reason_name
from loraplex.v1 import errors_pb2, inference_pb2, models_pb2


class FailedCall(grpc.RpcError):
    """A call that failed, as grpc shows it."""

    def __init__(self, code: grpc.StatusCode, details: str | None, trailing: Any) -> None:
        self._code, self._details, self._trailing = code, details, trailing

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str | None:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._trailing


def status(code: int, *details: Message) -> status_pb2.Status:
    built = status_pb2.Status(code=code, message="what went wrong")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        built.details.append(packed)
    return built


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_the_original_code_is_kept(code: grpc.StatusCode) -> None:
    error = from_status(status(code.value[0]))
    assert error.code is code
    assert error.message == "what went wrong"


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (code_pb2.INVALID_ARGUMENT, loraplex.InvalidArgument),
        (code_pb2.UNIMPLEMENTED, loraplex.Unsupported),
        (code_pb2.UNAUTHENTICATED, loraplex.Unauthenticated),
        (code_pb2.PERMISSION_DENIED, loraplex.PermissionDenied),
        (code_pb2.NOT_FOUND, loraplex.NotFound),
        (code_pb2.FAILED_PRECONDITION, loraplex.FailedPrecondition),
        (code_pb2.ALREADY_EXISTS, loraplex.AlreadyExists),
        (code_pb2.ABORTED, loraplex.Aborted),
        (code_pb2.RESOURCE_EXHAUSTED, loraplex.ResourceExhausted),
        (code_pb2.UNAVAILABLE, loraplex.Unavailable),
        (code_pb2.DEADLINE_EXCEEDED, loraplex.DeadlineExceeded),
        (code_pb2.CANCELLED, loraplex.Cancelled),
        (code_pb2.INTERNAL, loraplex.Internal),
        (code_pb2.UNKNOWN, LoraplexError),
        (999, LoraplexError),
    ],
)
def test_each_code_has_its_class(code: int, kind: type[LoraplexError]) -> None:
    assert type(from_status(status(code))) is kind


def test_details_are_decoded() -> None:
    violation = error_details_pb2.BadRequest.FieldViolation(field="spec.sampling.top_p", description="above 1")
    error = from_status(
        status(
            code_pb2.INVALID_ARGUMENT,
            error_details_pb2.ErrorInfo(reason="INVALID_PARAMETER", domain="loraplex", metadata={"limit": "1"}),
            error_details_pb2.BadRequest(field_violations=[violation]),
            error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=1, nanos=500_000_000)),
            error_details_pb2.ResourceInfo(resource_type="model", resource_name="models/demo"),
            error_details_pb2.RequestInfo(request_id="r1"),
        )
    )
    assert error.reason == "INVALID_PARAMETER"
    assert error.metadata == {"limit": "1"}
    assert error.violations == [Violation("spec.sampling.top_p", "above 1")]
    assert error.retry_after == 1.5
    assert error.resource == "models/demo"
    assert error.request_id == "r1"
    assert str(error) == "INVALID_PARAMETER: what went wrong"


def test_without_details_there_is_nothing_to_know() -> None:
    error = from_status(status(code_pb2.UNAVAILABLE))
    assert (error.reason, error.violations, error.retry_after, error.resource) == ("", [], None, "")
    assert (error.request_id, error.partial_usage, error.metadata) == ("", None, {})
    assert str(error) == "UNAVAILABLE: what went wrong"


def test_a_reason_of_another_domain_is_not_ours() -> None:
    info = error_details_pb2.ErrorInfo(reason="API_KEY_INVALID", domain="elsewhere.example")
    assert from_status(status(code_pb2.INVALID_ARGUMENT, info)).reason == ""


def test_what_was_consumed_before_the_failure() -> None:
    usage = inference_pb2.PartialUsage(request_id="r2", usage=inference_pb2.Usage(completion_tokens=3))
    error = from_status(status(code_pb2.UNAVAILABLE, usage))
    assert error.partial_usage == usage
    assert error.request_id == "r2"


def test_a_call_with_details() -> None:
    info = error_details_pb2.ErrorInfo(reason="OVERLOADED", domain="loraplex")
    trailing = [("other", "x"), ("grpc-status-details-bin", status(code_pb2.UNAVAILABLE, info).SerializeToString())]
    error = from_call(FailedCall(grpc.StatusCode.UNAVAILABLE, "short", trailing))
    assert isinstance(error, loraplex.Unavailable)
    assert (error.reason, error.message) == ("OVERLOADED", "what went wrong")


@pytest.mark.parametrize("trailing", [None, (), [("grpc-status-details-bin", b"\xff\xff\xff")]])
def test_a_call_without_details_or_with_garbage(trailing: Any) -> None:
    error = from_call(FailedCall(grpc.StatusCode.UNAVAILABLE, "connection refused", trailing))
    assert isinstance(error, loraplex.Unavailable)
    assert error.message == "connection refused"


def test_a_resource_that_failed_raises_its_error() -> None:
    model = models_pb2.Model(state=models_pb2.Model.STATE_FAILED, error=status(code_pb2.FAILED_PRECONDITION))
    with pytest.raises(loraplex.FailedPrecondition, match="what went wrong"):
        raise_for_error(model)


def test_a_resource_that_did_not_fail_raises_nothing() -> None:
    raise_for_error(models_pb2.Model(state=models_pb2.Model.STATE_ACTIVE))


def test_errors_cross_process_boundaries() -> None:
    # Task queues and process pools pickle what their workers raise.
    error = from_status(status(code_pb2.NOT_FOUND, error_details_pb2.ResourceInfo(resource_name="models/x")))
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made two lines above
    assert type(copy) is loraplex.NotFound
    assert (copy.resource, copy.code) == ("models/x", grpc.StatusCode.NOT_FOUND)


def test_reasons_are_spelled_without_their_prefix() -> None:
    assert reason_name(errors_pb2.ERROR_REASON_PROMPT_TOO_LONG) == "PROMPT_TOO_LONG"
