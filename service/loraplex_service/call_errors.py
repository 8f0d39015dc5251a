"""What callers are told of the exceptions that end their calls."""

import logging

import grpc
import grpc.aio
from google.rpc.status_pb2 import Status

from loraplex_service.call import Call
from loraplex_service.errors import EngineError, LoraplexError, to_status

logger = logging.getLogger(__name__)


def known_error(error: Exception, call: Call, what: str) -> LoraplexError:
    """Return the error if it is meant for the caller; else log it, and return an EngineError in its place."""
    if isinstance(error, LoraplexError):
        return error
    logger.error("%s failed, request_id=%s", what, call.request_id, exc_info=error)
    return EngineError(f"the server failed; quote request id {call.request_id} to its operator")


def error_status(error: LoraplexError, call: Call) -> Status:
    """The gRPC status of an error, with the tokens that the call had consumed."""
    return to_status(error, call.request_id, call.usage() if call.usage is not None else None)


def status_name(error: BaseException, call: Call) -> str:
    """The name of the status that the caller sees for the exception that ended the call."""
    if isinstance(error, LoraplexError):
        return error.code.name
    if isinstance(error, Exception) and not isinstance(error, grpc.aio.InternalError):
        return grpc.StatusCode.INTERNAL.name
    left = call.seconds_left()  # grpc cancels what has missed its deadline, too
    return "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
