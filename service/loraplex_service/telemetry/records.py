"""Records of ended calls and generations, and the interface of their observers."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from loraplex_service.call import Call


class AppliedAdapter(msgspec.Struct, frozen=True):
    """One of the adapters that a generation ran with."""

    name: str  # tenants/{tenant}/adapters/{adapter}
    digest: str  # the version: sha-256 of its content
    weight: float  # 1, unless the request gave another


class GenerationRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One generation that an engine has worked on. Names of statuses and reasons are those of the contract."""

    id: str  # unique; the request id that the caller sees
    client_request_id: str = ""  # the caller's own id
    labels: Mapping[str, str] = {}  # the caller's
    trace_id: str  # of the caller's trace, or of the one that began here; empty: neither
    operation: str  # of GenAI semantic conventions: chat, text_completion
    tenant: str
    model: str  # models/{model}
    model_revision: str
    adapter: str  # tenants/{tenant}/adapters/{adapter}; of a weighted sum {version}*{weight} + …; empty: the base model
    adapter_digest: str  # the version: sha-256 of its content; of a weighted sum, over its members and weights
    adapters: Sequence[AppliedAdapter] = ()  # all of them: none, one, or the members of a weighted sum
    constraint: str = ""  # the kind of the form that its outputs had, such as json_schema; empty: none
    status: str  # of grpc: OK, CANCELLED, …
    finish_reasons: Sequence[str]  # of the outputs that finished: EOS, STOP, MAX_TOKENS, …
    prompt_tokens: int
    cached_prompt_tokens: int  # the part found in the prefix cache
    completion_tokens: int  # of all outputs, generated, whether they were read or not
    draft_tokens: int = 0  # drafts that were checked for them
    accepted_draft_tokens: int = 0  # of these, right, and so among them
    started: float  # seconds since the epoch: when the call arrived
    seconds: float  # from the arrival to the end
    queue_seconds: float | None  # from the arrival to the first step that worked for it; None: there was none
    adapter_load_seconds: float  # spent waiting for the adapter
    first_token_seconds: float | None  # from the call's arrival; None: there was none

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of its adapters, each once, in order.

        Metrics use them, since the number of weights has no bound.
        """
        return tuple(sorted({adapter.name for adapter in self.adapters}))

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time between two tokens; None: there are fewer than two."""
        if self.first_token_seconds is None or self.completion_tokens < 2:
            return None
        return (self.seconds - self.first_token_seconds) / (self.completion_tokens - 1)


class CallRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One call of any of our methods."""

    method: str  # loraplex.v1.InferenceService/Generate
    status: str  # of grpc
    seconds: float


class Observer(Protocol):
    """An observer of calls, generations and adapters, called on the event loop.

    It must return at once and not raise.
    """

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        """Called before anything is known of the caller. May set the call's `trace_id` and `span`."""

    def call_ended(self, call: Call, record: CallRecord) -> None:
        """Called after all generations of the call have ended."""

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        """Called before the caller can see the end. For an item of a batch, `call` is the item's own."""

    def adapter_removed(self, name: str) -> None:
        """Called when all versions of an adapter (tenants/{tenant}/adapters/{adapter}) are gone and unused."""


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        for observer in self._observers:
            observer.call_started(call, method, metadata)

    def call_ended(self, call: Call, record: CallRecord) -> None:
        for observer in self._observers:
            observer.call_ended(call, record)

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        for observer in self._observers:
            observer.generation_ended(call, record)

    def adapter_removed(self, name: str) -> None:
        for observer in self._observers:
            observer.adapter_removed(name)


NOBODY = Observers()
