"""What callers of HTTP are told of failures: in OpenAI's words or Anthropic's, with the service's reason and field."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import grpc

from loraplex import LoraplexError

Named = Callable[[str], str | None]  # from the path of a field of the contract to the parameter that it was given by


REQUEST_ID = "x-request-id"


class Kind(NamedTuple):
    """How one kind of failure is told."""

    status: int
    type: str
    code: str = ""  # "": the reason, in lower case


# OpenAI's own codes where clients look for them.
BY_REASON = {
    "MODEL_NOT_FOUND": Kind(404, "invalid_request_error", "model_not_found"),
    "ADAPTER_NOT_FOUND": Kind(404, "invalid_request_error", "model_not_found"),
    "ROUTE_NOT_FOUND": Kind(404, "invalid_request_error", "model_not_found"),
    "PROMPT_TOO_LONG": Kind(400, "invalid_request_error", "context_length_exceeded"),
    "INVALID_PARAMETER": Kind(400, "invalid_request_error", "invalid_value"),
    "FEATURE_UNSUPPORTED": Kind(400, "invalid_request_error", "unsupported_parameter"),
    "TENANT_QUOTA": Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    "SLOW_CONSUMER": Kind(429, "rate_limit_error"),
    "MESSAGE_TOO_LARGE": Kind(413, "invalid_request_error"),
}
BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: Kind(400, "invalid_request_error"),
    grpc.StatusCode.OUT_OF_RANGE: Kind(400, "invalid_request_error"),
    grpc.StatusCode.UNIMPLEMENTED: Kind(400, "invalid_request_error"),
    grpc.StatusCode.FAILED_PRECONDITION: Kind(400, "invalid_request_error"),
    grpc.StatusCode.UNAUTHENTICATED: Kind(401, "authentication_error", "invalid_api_key"),
    grpc.StatusCode.PERMISSION_DENIED: Kind(403, "permission_error"),
    grpc.StatusCode.NOT_FOUND: Kind(404, "invalid_request_error"),
    grpc.StatusCode.ALREADY_EXISTS: Kind(409, "invalid_request_error"),
    grpc.StatusCode.ABORTED: Kind(409, "invalid_request_error"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: Kind(413, "invalid_request_error"),  # gRPC's own bounds: they do not pass
    grpc.StatusCode.CANCELLED: Kind(499, "server_error"),
    grpc.StatusCode.UNAVAILABLE: Kind(503, "server_error"),
    grpc.StatusCode.DEADLINE_EXCEEDED: Kind(504, "server_error"),
}
KINDS = {401: BY_CODE[grpc.StatusCode.UNAUTHENTICATED], 403: BY_CODE[grpc.StatusCode.PERMISSION_DENIED]}
FAULT = Kind(500, "server_error")
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    499: "api_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
NAMES_OF_MODELS = ("model", "adapter.base_model", "name")  # fields of messages
_SPEC = re.compile(r"\b(?:spec|specs\[\d+\])\.")


class Refusal(Exception):  # noqa: N818  (named for what happened)
    """The door itself answers: the request is not one that could be forwarded."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str = "",
        retry_after: float | None = None,
        allow: str = "",
    ) -> None:
        """`allow`: the methods that there are, where the one of the request is none."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or None
        self.retry_after = retry_after
        self.allow = allow


class Failure(NamedTuple):
    """An answer that says what went wrong."""

    status: int
    body: dict[str, Any]
    headers: dict[str, str]


def openai_error(failure: Failure) -> dict[str, Any]:
    """A failure as OpenAI's APIs tell it."""
    return failure.body


def anthropic_error(failure: Failure) -> dict[str, Any]:
    """A failure as Anthropic's API tells it, with the code, the parameter and the reason beside."""
    kind = ANTHROPIC_TYPES.get(failure.status, "invalid_request_error")
    error = {**failure.body["error"], "type": kind}
    return {"type": "error", "error": error, "request_id": failure.headers.get(REQUEST_ID)}


def refused(refusal: Refusal) -> Failure:
    """The answer for what the door refuses."""
    kind = KINDS.get(refusal.status) or Kind(0, "invalid_request_error" if refusal.status < 500 else "server_error")
    code = refusal.code or kind.code or None
    failure = _failure(refusal.status, refusal.message, kind.type, refusal.param, code, refusal.retry_after)
    if refusal.allow:
        failure.headers["allow"] = refusal.allow
    return failure


def failed(error: LoraplexError, named: Named = lambda path: None) -> Failure:
    """The answer for a call that failed. `named`: the parameters of the request, by what they became."""
    kind = BY_REASON.get(error.reason) or BY_CODE.get(error.code, FAULT)
    message, param = _SPEC.sub("", error.message), None
    for violation in error.violations:
        path = _SPEC.sub("", violation.field, count=1)
        name = named(path) or path
        message = re.sub(rf"(^|; ){re.escape(path)}: ", lambda found: f"{found[1]}{name}: ", message)  # noqa: B023
        param = param or name
    if kind.code == "model_not_found":
        param = next(filter(None, map(named, NAMES_OF_MODELS)), "model")
    code = kind.code or (error.reason or error.code.name).lower()
    failure = _failure(kind.status, message or error.code.name, kind.type, param, code, error.retry_after)
    failure.body["error"]["reason"] = error.reason or None
    if error.request_id:
        failure.headers[REQUEST_ID] = error.request_id
    return failure


def _failure(
    status: int, message: str, kind: str, param: str | None, code: str | None, retry_after: float | None
) -> Failure:
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    headers = {} if retry_after is None else {"retry-after": str(max(1, math.ceil(retry_after)))}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Failure(status, body, headers)
