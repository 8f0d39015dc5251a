"""What is written down of a request when it has ended."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

from google.protobuf.duration_pb2 import Duration

from loraplex.v1.inference_pb2 import Timings, Usage
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.versions import resource_name
from loraplex_service.telemetry.records import AppliedAdapter, GenerationRecord


class Accountable(Protocol):
    """What was decided about a request before its engine saw it."""

    @property
    def request_id(self) -> str:
        """The id that the caller sees."""

    @property
    def client_request_id(self) -> str: ...

    @property
    def labels(self) -> Mapping[str, str]: ...

    @property
    def operation(self) -> str:
        """The operation's name in telemetry."""

    @property
    def tenant(self) -> str: ...

    @property
    def target(self) -> ResolvedTarget: ...

    @property
    def adapter(self) -> AdapterKey | None: ...

    @property
    def arrival(self) -> float:
        """By the event loop's clock."""


def request_record(
    job: Accountable,
    status: str,
    trace_id: str,
    usage: Usage,
    timings: Timings,
    computed: bool,
    finish_reasons: Sequence[str] = (),
) -> GenerationRecord:
    """The record of a request that ends now. `computed`: whether a step has worked for it."""
    key, seconds = job.adapter, asyncio.get_running_loop().time() - job.arrival
    drew = timings.HasField("time_to_first_token")
    return GenerationRecord(
        id=job.request_id,
        client_request_id=job.client_request_id,
        labels=job.labels,
        trace_id=trace_id,
        operation=job.operation,
        tenant=job.tenant,
        model=job.target.model,
        model_revision=job.target.model_revision,
        adapter=job.target.adapter_version if key is None or key.parts else resource_name(key),
        adapter_digest="" if key is None else key.digest,
        adapters=() if key is None else [_applied(member, weight) for member, weight in key.terms],
        status=status,
        finish_reasons=finish_reasons,
        prompt_tokens=usage.prompt_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
        completion_tokens=usage.completion_tokens,
        draft_tokens=usage.draft_tokens,
        accepted_draft_tokens=usage.accepted_draft_tokens,
        started=time.time() - seconds,
        seconds=seconds,
        queue_seconds=_seconds(timings.queue_duration) if computed else None,
        adapter_load_seconds=_seconds(timings.adapter_load_duration),
        first_token_seconds=_seconds(timings.time_to_first_token) if drew else None,
    )


def _applied(key: AdapterKey, weight: float) -> AppliedAdapter:
    return AppliedAdapter(resource_name(key), key.digest, weight)


def _seconds(duration: Duration) -> float:
    return duration.ToMicroseconds() / 1e6
