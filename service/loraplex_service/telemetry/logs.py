"""The fields of log lines that name their call, and the access log."""

import logging
from collections.abc import Mapping

from loraplex_service.call import Call, find_call
from loraplex_service.telemetry.records import CallRecord, GenerationRecord

access = logging.getLogger("loraplex.access")


class CallFields(logging.Filter):
    """A filter that adds the current call's fields to each record, and drops none."""

    def filter(self, record: logging.LogRecord) -> bool:
        call = find_call()
        if call is not None:
            record.fields = call_fields(call) | getattr(record, "fields", {})
        return True


class CallersThatLeft(logging.Filter):
    """A filter that drops gRPC's error records about callers that left while they were answered, which any caller
    may.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.name == "grpc._cython.cygrpc" and str(record.msg).startswith("ExecuteBatchError raised"))


def call_fields(call: Call) -> dict[str, object]:
    """The fields known of a call by now."""
    fields = {
        "request_id": call.request_id,
        "client_request_id": call.client_request_id,
        "labels": dict(call.labels),
        "trace_id": call.trace_id,
        "tenant": call.tenant,
        "adapter": call.metadata.get("loraplex-adapter-version", ""),  # with the digest of its version
    }
    return {name: value for name, value in fields.items() if value}


class AccessLog:
    """An observer that writes a line for each call, and one for each generation."""

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        pass

    def call_ended(self, call: Call, record: CallRecord) -> None:
        fields = call_fields(call) | {
            "method": record.method,
            "status": record.status,
            "seconds": round(record.seconds, 6),
        }
        message = "%s %s %.3f s tenant=%s request_id=%s%s"
        values = (record.method, record.status, record.seconds, call.tenant, call.request_id, _callers_own(call))
        access.info(message, *values, extra={"fields": fields})

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        message = "generation %s %s %.3f s tenant=%s request_id=%s%s %d prompt tokens (%d cached), %d generated"
        access.info(
            message,
            record.adapter or record.model,
            record.status,
            record.seconds,
            record.tenant,
            record.id,
            _callers_own(call),
            record.prompt_tokens,
            record.cached_prompt_tokens,
            record.completion_tokens,
            extra={"fields": call_fields(call) | generation_fields(record)},
        )

    def adapter_removed(self, name: str) -> None:
        pass


def _callers_own(call: Call) -> str:
    """The caller's request id for a line of text, quoted, since it may hold any character."""
    fields = {"client_request_id": call.client_request_id, "labels": dict(call.labels)}
    return "".join(f" {name}={value!r}" for name, value in fields.items() if value)


def generation_fields(record: GenerationRecord) -> dict[str, object]:
    names = (
        "operation",
        "model",
        "adapter_digest",
        "status",
        "finish_reasons",
        "prompt_tokens",
        "cached_prompt_tokens",
        "completion_tokens",
        "draft_tokens",
        "accepted_draft_tokens",
        "seconds",
        "queue_seconds",
        "first_token_seconds",
    )
    return {name: getattr(record, name) for name in names}
