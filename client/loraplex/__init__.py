"""Clients of Loraplex, for other services to import.

`AsyncClient` and `Client` generate text and tokenise, over the data port. `AsyncAdminClient` and `AdminClient` manage
models, adapters and routes, over the admin port. Every method is one call of the contract, with keyword arguments for
its fields; answers are the messages of `loraplex.v1`. A call that fails raises a `LoraplexError`.
`help(Client.generate)` shows every option, and so for the other methods.

    async with AsyncClient("localhost:50051") as client:
        answer = await client.generate("demo", "Once upon a time", max_tokens=32, temperature=0)
        print(answer.outputs[0].text)

        stream = client.stream_generate("demo", [{"role": "user", "content": "Hello"}], max_tokens=32)
        async for piece in stream.text():
            print(piece, end="")

Enumerators are numbers that print as their names, such as FINISH_REASON_MAX_TOKENS; `enum_name` leaves the prefix out.

Leaving the loop early, in whatever way, cancels the generation and frees what the server holds for it.
"""

from loraplex.async_client import AsyncAdminClient, AsyncClient
from loraplex.awaiting import AsyncGenerateStream, AsyncStream
from loraplex.blocking import GenerateStream, Stream
from loraplex.client import AdminClient, Client
from loraplex.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    IncompleteStream,
    Internal,
    InvalidArgument,
    LoraplexError,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    Unsupported,
    Violation,
    from_status,
    raise_for_error,
)
from loraplex.generation import GenerateOptions, constraint
from loraplex.names import enum_name
from loraplex.prompts import assistant_message
from loraplex.specs import generate_spec
from loraplex.watermark import Detection, Watermark

__all__ = [
    "Aborted",
    "AdminClient",
    "AlreadyExists",
    "AsyncAdminClient",
    "AsyncClient",
    "AsyncGenerateStream",
    "AsyncStream",
    "Cancelled",
    "Client",
    "DeadlineExceeded",
    "Detection",
    "FailedPrecondition",
    "GenerateOptions",
    "GenerateStream",
    "IncompleteStream",
    "Internal",
    "InvalidArgument",
    "LoraplexError",
    "NotFound",
    "PermissionDenied",
    "ResourceExhausted",
    "Stream",
    "Unauthenticated",
    "Unavailable",
    "Unsupported",
    "Violation",
    "Watermark",
    "assistant_message",
    "constraint",
    "enum_name",
    "from_status",
    "generate_spec",
    "raise_for_error",
]
