# ruff: noqa: N818  (named for what happened, as httpx does: a caller reads `except NotFound`)
"""The errors of calls, and their one mapping to google.rpc.

Raise these anywhere in the service; the interceptor turns them into the status of the call. Each message says what is
wrong, where, and what to do: it is written for the caller, and shows nothing that the caller may not see.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, QuotaFailure, RequestInfo, ResourceInfo, RetryInfo
from google.rpc.status_pb2 import Status

from loraplex.v1.inference_pb2 import PartialUsage, Usage
from loraplex_adapters.errors import COLD, UNREADABLE, AdapterNotFound

# LoraplexError
# ├── InvalidRequest        INVALID_ARGUMENT     INVALID_PARAMETER: every field that is at fault
# │   └── PromptTooLong                          PROMPT_TOO_LONG: how many tokens, how many fit
# ├── FeatureUnsupported    UNIMPLEMENTED        FEATURE_UNSUPPORTED: the field
# ├── Unauthenticated       UNAUTHENTICATED      UNAUTHENTICATED
# ├── PermissionDenied      PERMISSION_DENIED    PERMISSION_DENIED, SOURCE_NOT_ALLOWED, ADAPTER_UNTRUSTED
# ├── NotFound              NOT_FOUND            MODEL_NOT_FOUND, ADAPTER_NOT_FOUND, ROUTE_NOT_FOUND,
# │                                              USAGE_RECORD_NOT_FOUND: the resource
# ├── FailedPrecondition    FAILED_PRECONDITION  ADAPTER_BASE_MISMATCH, ADAPTER_RANK_TOO_HIGH, ADAPTER_INVALID,
# │                                              ADAPTER_TOO_LARGE, ADAPTER_UNREADABLE, ADAPTER_IS_CURRENT,
# │                                              ADAPTER_PINNED, ADAPTER_PIN_LIMIT, ADAPTER_UNTRUSTED, MODEL_UNLOADED
# ├── AlreadyExists         ALREADY_EXISTS       ALREADY_EXISTS: the resource
# ├── Aborted               ABORTED              ETAG_MISMATCH
# ├── QuotaExceeded         RESOURCE_EXHAUSTED   TENANT_QUOTA: what for, retry_after
# ├── SlowConsumer          RESOURCE_EXHAUSTED   SLOW_CONSUMER
# ├── MessageTooLarge       RESOURCE_EXHAUSTED   MESSAGE_TOO_LARGE: how many bytes, how many are allowed
# ├── Unavailable           UNAVAILABLE          OVERLOADED, ADAPTER_COLD, ADAPTER_UNREADABLE, MODEL_LOADING, DRAINING,
# │                                              ENGINE_RESTARTING, USAGE_UNWRITABLE, USAGE_UNREADABLE,
# │                                              STATE_UNWRITABLE: retry_after
# ├── DeadlineExceeded      DEADLINE_EXCEEDED    DEADLINE_EXCEEDED
# ├── Cancelled             CANCELLED            CANCELLED: by CancelGeneration, not by the call
# └── EngineError           INTERNAL             ENGINE_ERROR: the id to quote


class LoraplexError(Exception):
    """An error that the caller is told. `reason`: a name of loraplex.v1.ErrorReason without its prefix."""

    code = grpc.StatusCode.INTERNAL

    def __init__(self, reason: str, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = metadata  # of ErrorInfo: what a program may want to read without parsing the message

    def details(self) -> list[Message]:
        """The details that google.rpc defines a message for, besides ErrorInfo."""
        return []


@dataclass(frozen=True, slots=True)
class Violation:
    """One field at fault."""

    field: str  # path in the request, such as "spec.sampling.top_p"
    problem: str


class InvalidRequest(LoraplexError):
    """Fields of the request have values outside their limits."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, *violations: Violation, reason: str = "INVALID_PARAMETER", **metadata: str) -> None:
        message = "; ".join(f"{violation.field}: {violation.problem}" for violation in violations)
        super().__init__(reason, message, **metadata)
        self.violations = violations

    @classmethod
    def at(cls, field: str, problem: str) -> "InvalidRequest":
        return cls(Violation(field, problem))

    def rename(self, name: Callable[[str], str]) -> None:
        """Name the fields as another definition does. `name`: its field for one of ours."""
        self.violations = tuple(replace(each, field=name(each.field)) for each in self.violations)
        self.message = "; ".join(f"{violation.field}: {violation.problem}" for violation in self.violations)

    def details(self) -> list[Message]:
        return [_bad_request(self.reason, self.violations)]


class PromptTooLong(InvalidRequest):
    """The prompt, with what is to follow it, does not fit the model's context."""

    def __init__(self, field: str, problem: str, tokens: int, limit: int) -> None:
        super().__init__(
            Violation(field, problem), reason="PROMPT_TOO_LONG", prompt_tokens=str(tokens), limit_tokens=str(limit)
        )

    @classmethod
    def of(cls, field: str, tokens: int, max_model_len: int, num_drawn: int = 1, least: str = "") -> "PromptTooLong":
        """The error for a prompt of so many tokens (with `least`: at least so many) that leaves no room for those to
        be drawn.
        """
        most = max_model_len - num_drawn
        takes = f", less {'one' if num_drawn == 1 else num_drawn} for the output, takes {most}" if num_drawn else ""
        problem = f"has {least}{tokens} tokens; the context of {max_model_len}{takes}"
        remedy = "Shorten it, or set truncate_to_tokens"
        return cls(field, f"{problem}. {remedy}", tokens, most)


class FeatureUnsupported(LoraplexError):
    """This server, model or device cannot do what the field asks. Never ignored, always refused."""

    code = grpc.StatusCode.UNIMPLEMENTED

    def __init__(self, field: str, problem: str = "is not supported by this server; leave it out") -> None:
        super().__init__("FEATURE_UNSUPPORTED", f"{field}: {problem}", field=_clip(field, 100))
        self.violation = Violation(field, problem)

    @classmethod
    def unknown(cls, field: str) -> "FeatureUnsupported":
        return cls(field, "is a field that this server's version of the contract does not have")

    def rename(self, name: Callable[[str], str]) -> None:
        """Name the field as another definition does. `name`: its field for one of ours."""
        self.violation = replace(self.violation, field=name(self.violation.field))
        self.message = f"{self.violation.field}: {self.violation.problem}"
        self.metadata = {"field": _clip(self.violation.field, 100)}

    def details(self) -> list[Message]:
        return [_bad_request(self.reason, [self.violation])]


class Unauthenticated(LoraplexError):
    """No credentials, or not valid ones."""

    code = grpc.StatusCode.UNAUTHENTICATED

    def __init__(self, message: str) -> None:
        super().__init__("UNAUTHENTICATED", message)


class PermissionDenied(LoraplexError):
    """The caller may not do this. Raise it before looking whether the thing exists."""

    code = grpc.StatusCode.PERMISSION_DENIED

    def __init__(self, message: str, reason: str = "PERMISSION_DENIED") -> None:
        super().__init__(reason, message)


class NotFound(LoraplexError):
    """No such model, adapter, version or route."""

    code = grpc.StatusCode.NOT_FOUND

    def __init__(self, reason: str, resource_name: str, message: str) -> None:
        super().__init__(reason, message)
        self.resource_name = resource_name

    def details(self) -> list[Message]:
        return [_resource_info(self.reason.removesuffix("_NOT_FOUND"), self.resource_name, self.message)]


class FailedPrecondition(LoraplexError):
    """The request is right, but not in the present state: changing the state comes first."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class AlreadyExists(LoraplexError):
    """The name exists with other content."""

    code = grpc.StatusCode.ALREADY_EXISTS

    def __init__(self, resource_type: str, resource_name: str, message: str) -> None:
        super().__init__("ALREADY_EXISTS", message)
        self.resource_type = resource_type
        self.resource_name = resource_name

    def details(self) -> list[Message]:
        return [_resource_info(self.resource_type, self.resource_name, self.message)]


class Aborted(LoraplexError):
    """The resource changed since the caller read it."""

    code = grpc.StatusCode.ABORTED

    def __init__(self, message: str) -> None:
        super().__init__("ETAG_MISMATCH", message)


class QuotaExceeded(LoraplexError):
    """The tenant is over its quota. Every replica would say the same."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, subject: str, message: str, retry_after_seconds: float) -> None:
        super().__init__("TENANT_QUOTA", message)
        self.subject = subject  # such as "tenants/acme: tokens per minute"
        self.retry_after_seconds = retry_after_seconds

    def details(self) -> list[Message]:
        violation = QuotaFailure.Violation(subject=_clip(self.subject, 200), description=_clip(self.message, 400))
        return [QuotaFailure(violations=[violation]), _retry_info(self.retry_after_seconds)]


def unknown_adapter(name: str, error: AdapterNotFound) -> NotFound:
    """The error for a caller that names an adapter which does not exist."""
    return NotFound("ADAPTER_NOT_FOUND", name, f"{error}; list those there are, or check its spelling")


def unusable_adapter(name: str, problems: str, reason: str) -> LoraplexError:
    """The error for a request whose adapter the engine cannot use. `reason`: one of `loraplex_adapters.errors`."""
    message = f"adapter {name} cannot be served: {problems}"
    return Unavailable(reason, message) if reason in (UNREADABLE, COLD) else FailedPrecondition(reason, message)


class SlowConsumer(LoraplexError):
    """The caller reads its stream too slowly, and it was cut."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, message: str) -> None:
        super().__init__("SLOW_CONSUMER", message)


class MessageTooLarge(LoraplexError):
    """A request, or the answer to one, has more bytes than a message of its method may have."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, problem: str, size: int, limit: int) -> None:
        super().__init__("MESSAGE_TOO_LARGE", problem, bytes=str(size), limit_bytes=str(limit))

    @classmethod
    def answer(cls, size: int, limit: int) -> "MessageTooLarge":
        return cls(
            f"the answer has {size} bytes, and one message has at most {limit}; stream it, or ask for less", size, limit
        )


class Unavailable(LoraplexError):
    """A retry, perhaps at another replica, may succeed. The only error that clients retry by themselves."""

    code = grpc.StatusCode.UNAVAILABLE

    def __init__(self, reason: str, message: str, retry_after_seconds: float = 1.0) -> None:
        super().__init__(reason, message)
        self.retry_after_seconds = retry_after_seconds

    def details(self) -> list[Message]:
        return [_retry_info(self.retry_after_seconds)]


class DeadlineExceeded(LoraplexError):
    """The call's deadline passed."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED

    def __init__(self, message: str) -> None:
        super().__init__("DEADLINE_EXCEEDED", message)


class Cancelled(LoraplexError):
    """A caller of the same tenant ended the request with CancelGeneration."""

    code = grpc.StatusCode.CANCELLED

    def __init__(self, message: str) -> None:
        super().__init__("CANCELLED", message)


class EngineError(LoraplexError):
    """A fault of the server. The caller gets the id to quote; what happened is in the log."""

    def __init__(self, message: str) -> None:
        super().__init__("ENGINE_ERROR", message)


# ---- the map to google.rpc -------------------------------------------------------------------------------------------

DOMAIN = "loraplex"
LONGEST_RETRY_SECONDS = 86_400.0  # who must wait for longer may as well ask once a day
MAX_STATUS_BYTES = 4096  # at 20 KB the details, and the last message before them, were lost
_MAX_MESSAGE_BYTES = 1024  # as it travels, percent-encoded
_MAX_VIOLATIONS = 8


def to_status(error: LoraplexError, request_id: str, usage: Usage | None = None) -> Status:
    """The status of a call that ends with this error. `usage`: the tokens that its generation had consumed.

    Always carries ErrorInfo. Smaller than MAX_STATUS_BYTES, whatever the error quotes from the request.
    """
    message = _clip(error.message, _MAX_MESSAGE_BYTES)
    info = ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=_clipped(error.metadata))
    details: list[Message] = [info, *error.details()]
    if error.code is grpc.StatusCode.INTERNAL:
        details.append(RequestInfo(request_id=request_id))
    if usage is not None:
        details.append(PartialUsage(request_id=request_id, usage=usage))
    status = _pack(error.code, message, details)
    return status if status.ByteSize() < MAX_STATUS_BYTES else _pack(error.code, message, [info])


def trailing_metadata(error: LoraplexError, status: Status) -> tuple[tuple[str, str | bytes], ...]:
    """The trailing metadata with the status's details, and with the seconds after which a client should retry."""
    metadata: list[tuple[str, str | bytes]] = [("grpc-status-details-bin", status.SerializeToString())]
    if isinstance(error, Unavailable):
        metadata.append(("grpc-retry-pushback-ms", str(round(error.retry_after_seconds * 1000))))
    return tuple(metadata)


def _pack(code: grpc.StatusCode, message: str, details: Iterable[Message]) -> Status:
    status = Status(code=code.value[0], message=message)
    for detail in details:
        packed = Any()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _bad_request(reason: str, violations: Sequence[Violation]) -> BadRequest:
    return BadRequest(
        field_violations=[
            BadRequest.FieldViolation(
                field=_clip(violation.field, 100), description=_clip(violation.problem, 200), reason=reason
            )
            for violation in violations[:_MAX_VIOLATIONS]
        ]
    )


def _resource_info(resource_type: str, name: str, message: str) -> ResourceInfo:
    return ResourceInfo(
        resource_type=f"loraplex.v1.{resource_type.capitalize()}",
        resource_name=_clip(name, 200),
        description=_clip(message, 400),
    )


def _retry_info(seconds: float) -> RetryInfo:
    delay = Duration()
    delay.FromMilliseconds(round(min(seconds, LONGEST_RETRY_SECONDS) * 1000))
    return RetryInfo(retry_delay=delay)


def _clipped(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: _clip(value, 100) for key, value in metadata.items()}


def _clip(text: str, max_bytes: int) -> str:
    """`text`, cut where it would take more than `max_bytes` percent-encoded, as grpc-message is."""
    size = 0
    for position, char in enumerate(text):
        size += 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode(errors="replace"))
        if size > max_bytes - 3:
            return text[:position] + "..."
    return text
