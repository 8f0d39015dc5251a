"""Errors of calls, decoded from a status and the google.rpc details that Loraplex sends with it.

    LoraplexError
    ├── InvalidArgument      a field is outside its limits: `violations` says which and why
    ├── Unsupported          this server or model cannot do that: `violations` names the field
    ├── Unauthenticated      no credentials, or not valid ones
    ├── PermissionDenied     the caller may not do this
    ├── NotFound             no such model, adapter or route: `resource`
    ├── FailedPrecondition   an adapter that cannot be served, a model that is not loaded
    ├── AlreadyExists        that name or version exists with other content
    ├── Aborted              somebody else changed the resource first: read it again
    ├── ResourceExhausted    over quota, or read too slowly: `retry_after`
    ├── Unavailable          try again, perhaps another replica: `retry_after`
    ├── DeadlineExceeded     the call's timeout passed
    ├── Cancelled            the call was cancelled
    ├── Internal             a fault of the server: quote `request_id`
    └── IncompleteStream     the stream ended with OK but without Completed: something between cut it

`reason` is the name of an ErrorReason without its prefix, such as "PROMPT_TOO_LONG"; `code` is the original gRPC code.
"""

# The classes have the names of the status codes, as everybody who knows gRPC knows them, without "Error" after each.
# ruff: noqa: N818

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from loraplex.v1 import errors_pb2, inference_pb2

DOMAIN = "loraplex"
_DETAILS_KEY = "grpc-status-details-bin"
_DetailT = TypeVar("_DetailT", bound=Message)


@dataclass(frozen=True, slots=True)
class Violation:
    """One field of the request, by its path, and what is wrong with it."""

    field: str
    description: str


class LoraplexError(Exception):
    """A call failed. `status` holds everything that the server said about it."""

    def __init__(self, code: grpc.StatusCode, status: status_pb2.Status) -> None:
        super().__init__(status.message or code.name)
        self.code = code
        self.status = status

    def __str__(self) -> str:
        return f"{self.reason or self.code.name}: {self.status.message or 'no message'}"

    def __reduce__(self) -> tuple[type["LoraplexError"], tuple[grpc.StatusCode, status_pb2.Status]]:
        return type(self), (self.code, self.status)

    @property
    def message(self) -> str:
        """Text that the server wrote for people."""
        return self.status.message

    @property
    def reason(self) -> str:
        """Name of an ErrorReason without its prefix. "": the status is not Loraplex's, but a proxy's or gRPC's own."""
        info = self._detail(error_details_pb2.ErrorInfo)
        return info.reason if info is not None and info.domain == DOMAIN else ""

    @property
    def metadata(self) -> dict[str, str]:
        """Further facts about the error, by name."""
        info = self._detail(error_details_pb2.ErrorInfo)
        return dict(info.metadata) if info is not None else {}

    @property
    def violations(self) -> list[Violation]:
        """Fields that are at fault."""
        request = self._detail(error_details_pb2.BadRequest)
        return [Violation(v.field, v.description) for v in request.field_violations] if request is not None else []

    @property
    def retry_after(self) -> float | None:
        """Seconds to wait before the next attempt. None: the server did not say."""
        retry = self._detail(error_details_pb2.RetryInfo)
        return retry.retry_delay.ToNanoseconds() / 1e9 if retry is not None else None

    @property
    def resource(self) -> str:
        """Name of the resource that the error is about. "": there is none."""
        resource = self._detail(error_details_pb2.ResourceInfo)
        return resource.resource_name if resource is not None else ""

    @property
    def request_id(self) -> str:
        """The server's id of the request, for support. "": the request had none yet."""
        request = self._detail(error_details_pb2.RequestInfo)
        if request is not None:
            return request.request_id
        return self.partial_usage.request_id if self.partial_usage is not None else ""

    @property
    def partial_usage(self) -> inference_pb2.PartialUsage | None:
        """Tokens that a generation had consumed when it failed. None: the server did not say."""
        return self._detail(inference_pb2.PartialUsage)

    def _detail(self, kind: type[_DetailT]) -> _DetailT | None:
        for packed in self.status.details:
            detail = kind()
            if packed.Unpack(detail):
                return detail
        return None


class InvalidArgument(LoraplexError):
    """A field of the request has a value outside its limits."""


class Unsupported(LoraplexError):
    """This server, model or device cannot do what a field asks."""


class Unauthenticated(LoraplexError):
    """No credentials, or not valid ones."""


class PermissionDenied(LoraplexError):
    """The caller may not do this."""


class NotFound(LoraplexError):
    """No such model, adapter or route."""


class FailedPrecondition(LoraplexError):
    """The adapter cannot be served on its model, or the model is not loaded."""


class AlreadyExists(LoraplexError):
    """The name or version exists with other content."""


class Aborted(LoraplexError):
    """The resource changed since it was read."""


class ResourceExhausted(LoraplexError):
    """The tenant is over its quota, or the caller read its stream too slowly."""


class Unavailable(LoraplexError):
    """Try again, perhaps another replica. The client has already tried three times."""


class DeadlineExceeded(LoraplexError):
    """The call's timeout passed."""


class Cancelled(LoraplexError):
    """The call was cancelled, by this side or with CancelGeneration."""


class Internal(LoraplexError):
    """A fault of the server."""


class IncompleteStream(LoraplexError):
    """The stream ended with status OK but without its last message: something between the two ends cut it."""


_CLASSES: dict[grpc.StatusCode, type[LoraplexError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNIMPLEMENTED: Unsupported,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.CANCELLED: Cancelled,
    grpc.StatusCode.INTERNAL: Internal,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


class FailedCall(Protocol):
    """Part of gRPC's errors, of either kind of client, that says what went wrong."""

    def code(self) -> grpc.StatusCode: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[Any] | None: ...  # pairs of key and value


def from_call(call: FailedCall) -> LoraplexError:
    """Make the error of a call that gRPC says has failed."""
    code = call.code()
    status = status_pb2.Status(code=code.value[0], message=call.details() or "")
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status = status_pb2.Status.FromString(value)
            except DecodeError:
                # Another party's bytes: the code and the message are what there is to know.
                continue
    return _CLASSES.get(code, LoraplexError)(code, status)


def from_status(status: status_pb2.Status) -> LoraplexError:
    """Make the error that a status inside a message means. An item of a batch or a resource that failed has one."""
    code = _CODES.get(status.code, grpc.StatusCode.UNKNOWN)
    return _CLASSES.get(code, LoraplexError)(code, status)


def local(kind: type[LoraplexError], code: grpc.StatusCode, message: str) -> LoraplexError:
    """Make an error that this side finds out by itself."""
    return kind(code, status_pb2.Status(code=code.value[0], message=message))


class HasError(Protocol):
    """Resource that says why it failed: a Model or an Adapter."""

    @property
    def error(self) -> status_pb2.Status: ...


def raise_for_error(resource: HasError) -> None:
    """Raise the error of a model or an adapter that failed. Nothing is raised for one that did not fail."""
    if resource.error.code != grpc.StatusCode.OK.value[0]:
        raise from_status(resource.error)


def reason_name(reason: errors_pb2.ErrorReason.ValueType) -> str:
    """The reason as ErrorInfo spells it: ERROR_REASON_OVERLOADED is "OVERLOADED"."""
    return errors_pb2.ErrorReason.Name(reason).removeprefix("ERROR_REASON_")
