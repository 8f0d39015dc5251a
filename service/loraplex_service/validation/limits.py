"""The limits of the contract: one table for all methods, by "Message.field", and limits on whole messages.

Each limit has a text form, and the comment of the field in `proto/` uses the same words. A field without presence that
is zero or empty counts as absent and is not checked here: required fields are checked where they are needed.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.duration_pb2 import Duration

from loraplex.v1.generation_pb2 import DraftKind, EarlyStopping, LogprobsMode, OnCold
from loraplex.v1.pooling_pb2 import Activation, Pooling
from loraplex.v1.prompt_pb2 import ToolMode
from loraplex_engine.link.drafts import MOST_DRAFTS
from loraplex_service.timestamps import duration_seconds

Problems = Iterator[tuple[str, str]]  # (suffix of the field's path, what is wrong there)


class Limit(Protocol):
    """The values that one field may have."""

    @property
    def words(self) -> str:
        """The limit in the words of the field's comment."""

    def problems(self, value: Any) -> Problems:
        """Describe everything that is wrong with a value."""


@dataclass(frozen=True, slots=True)
class Range:
    """A number from `low` (or above it) to `high`. NaN is in no range."""

    low: float
    high: float = math.inf
    above: bool = False
    unit: str = ""

    @property
    def words(self) -> str:
        low, high = f"{self.low:g}{self.unit}", f"{self.high:g}{self.unit}"
        if self.high == math.inf:
            return f"above {low}" if self.above else f"at least {low}"
        return f"above {low}, at most {high}" if self.above else f"from {low} to {high}"

    def problems(self, value: float) -> Problems:
        if not self.low <= value <= self.high or (self.above and value == self.low):
            yield "", f"must be {self.words}, is {value}{self.unit}"


@dataclass(frozen=True, slots=True)
class Seconds:
    """A duration in a range of seconds."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False

    @property
    def words(self) -> str:
        return self._range.words

    def problems(self, value: Duration) -> Problems:
        return self._range.problems(duration_seconds(value))

    @property
    def _range(self) -> Range:
        return Range(self.low, self.high, self.above, " s")


@dataclass(frozen=True, slots=True)
class Text:
    """A text with a limit in characters or UTF-8 bytes, or a bytes field."""

    most: int
    least: int = 0
    unit: str = "characters"

    @property
    def words(self) -> str:
        return f"from {self.least} to {self.most} {self.unit}" if self.least else f"at most {self.most} {self.unit}"

    def problems(self, value: str | bytes) -> Problems:
        size = len(value.encode()) if self.unit == "bytes" and isinstance(value, str) else len(value)
        if not self.least <= size <= self.most:
            yield "", f"has {size} {self.unit}; {self.words} are allowed"


@dataclass(frozen=True, slots=True)
class Entries:
    """A list or a map with a limit on its length and on each entry."""

    most: int
    of: Limit | None = None
    keys: Text | None = None  # of a map
    alone: bool = False  # each is a request of its own: it is checked when its turn comes, and fails alone

    @property
    def words(self) -> str:
        words = f"at most {self.most}"
        if isinstance(self.of, Text) and self.keys is not None:
            return f"{words}; keys up to {self.keys.most} characters, values up to {self.of.most}"
        if self.keys is not None:
            words += f"; keys up to {self.keys.most} characters"
        return words if self.of is None else f"{words}, each {self.of.words}"

    def problems(self, value: Any) -> Problems:
        if len(value) > self.most:
            yield "", f"has {len(value)} entries; at most {self.most} are allowed"
            return
        if self.keys is not None:
            for key in value:
                for _, problem in self.keys.problems(key):
                    yield "", f"the key {key[:63]!r} {problem}"
        if self.of is not None:
            for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
                for suffix, problem in self.of.problems(item):
                    yield f"[{str(key)[:63]}]{suffix}", problem


@dataclass(frozen=True, slots=True)
class Known:
    """An enum value that this server knows."""

    values: Callable[[], Sequence[int]]

    @property
    def words(self) -> str:
        return ""

    def problems(self, value: int) -> Problems:
        if value not in self.values():
            yield "", f"{value} is not an enum value that this server knows"


@dataclass(frozen=True, slots=True)
class Total:
    """A limit on a whole message, where many fields within their own limits would still be too much."""

    characters: int
    entries: int  # entries of lists and maps, except numbers
    numbers: int = 0  # numbers in lists and maps

    @property
    def words(self) -> str:
        words = f"in all at most {self.characters} characters and {self.entries} entries"
        return f"{words}, and {self.numbers} numbers" if self.numbers else words


_NAME = Text(512)
_ID = Text(63)
_UUID = Text(64)
_ETAG = Text(128)
_PAGE_TOKEN = Text(512)
_PAGE_SIZE = Range(0, 1000)
_LABELS = Entries(64, Text(256), keys=Text(63, least=1))
_PROMPT = Text(1 << 21)  # eight bytes for each of the tokens that a prompt may have
_TOKENS = 1 << 18  # to read or write as many takes the interpreter lock for 3 ms

LIMITS: Mapping[str, Limit] = {
    # ---- generation.proto
    "GenerateSpec.model": Text(512),
    "GenerateSpec.priority": Range(-100, 100),
    "GenerateSpec.client_request_id": Text(128),
    "GenerateSpec.labels": Entries(16, Text(256), keys=Text(63)),
    "Sampling.temperature": Range(0, 10),
    "Sampling.top_p": Range(0, 1, above=True),
    "Sampling.top_k": Range(0),
    "Sampling.min_p": Range(0, 1),
    "Sampling.typical_p": Range(0, 1, above=True),
    "Sampling.repetition_penalty": Range(0.01, 10),
    "Sampling.presence_penalty": Range(-2, 2),
    "Sampling.frequency_penalty": Range(-2, 2),
    "Sampling.n": Range(1, 16),
    "Sampling.best_of": Range(1, 16),
    "Watermark.key": Text(64, least=16, unit="bytes"),
    "Watermark.gamma": Range(0.01, 0.99),
    "Watermark.delta": Range(0, 20, above=True),
    "Watermark.context_tokens": Range(1, 8),
    "BeamSearch.num_beams": Range(2, 16),
    "BeamSearch.length_penalty": Range(-10, 10),
    "BeamSearch.early_stopping": Known(EarlyStopping.values),
    "Sampling.logit_bias": Entries(1024, Range(-100, 100)),
    "Sampling.allowed_token_ids": Entries(1024),
    "Sampling.bad_words": Entries(64, Text(128, least=1)),
    "Stopping.max_tokens": Range(0),
    "Stopping.min_tokens": Range(0),
    "Stopping.stop": Entries(16, Text(256, least=1, unit="bytes")),
    "Stopping.stop_token_ids": Entries(64),
    "Stopping.time_limit": Seconds(0, above=True),
    "Constraint.json_schema": Text(65536, least=1, unit="bytes"),
    "Constraint.regex": Text(4096, least=1, unit="bytes"),
    "Constraint.grammar": Text(65536, least=1, unit="bytes"),
    "Choices.values": Entries(256, Text(65536, least=1, unit="bytes")),
    "OutputOptions.top_logprobs": Range(0, 20),
    "OutputOptions.prompt_logprobs": Range(0, 20),
    "OutputOptions.logprob_token_ids": Entries(20),
    "OutputOptions.logprobs_mode": Known(LogprobsMode.values),
    "CacheOptions.salt": Text(128, unit="bytes"),
    "AdapterPolicy.on_cold": Known(OnCold.values),
    "AdapterPolicy.max_load_wait": Seconds(0),
    "Drafts.draft_kind": Known(DraftKind.values),
    "Drafts.max_draft_tokens": Range(1, MOST_DRAFTS),
    "StreamOptions.min_tokens_per_chunk": Range(1, 256),
    "StreamOptions.max_chunk_delay": Seconds(0, 10),
    # ---- prompt.proto
    "Prompt.text": Text(1 << 21, least=1, unit="bytes"),
    "Prompt.truncate_to_tokens": Range(1),
    "TokenIds.ids": Entries(_TOKENS),
    "Chat.messages": Entries(1024),
    "Chat.tools": Entries(128),
    "ChatMessage.role": Text(64),
    "ChatMessage.content": _PROMPT,
    "ChatMessage.name": Text(256),
    "ChatMessage.reasoning_content": _PROMPT,
    "ChatMessage.tool_calls": Entries(128),
    "ChatMessage.tool_call_id": Text(256),
    "Tool.name": Text(256),
    "Tool.description": Text(65536),
    "Tool.parameters_json": Text(65536, unit="bytes"),
    "ToolChoice.name": Text(256),
    "ToolChoice.mode": Known(ToolMode.values),
    "ToolCall.id": Text(256),
    "ToolCall.name": Text(256),
    "ToolCall.arguments_json": Text(1 << 20),
    # ---- inference.proto
    "BatchGenerateRequest.specs": Entries(256, alone=True),
    "BatchGenerateRequest.max_concurrency": Range(1),
    "ScoreRequest.candidates": Entries(16),
    "Candidate.text": Text(65536, least=1, unit="bytes"),
    "CancelGenerationRequest.request_ids": Entries(256, Text(128)),
    "CancelGenerationRequest.client_request_ids": Entries(256, Text(128)),
    # ---- pooling.proto
    "EmbedRequest.model": _NAME,
    "EmbedRequest.prompts": Entries(256),
    "EmbedRequest.pooling": Known(Pooling.values),
    "EmbedRequest.dimensions": Range(1),
    "ClassifyRequest.model": _NAME,
    "ClassifyRequest.prompts": Entries(256),
    "ClassifyRequest.activation": Known(Activation.values),
    "RerankRequest.model": _NAME,
    "RerankRequest.query": Text(65536),
    "RerankRequest.documents": Entries(256, _PROMPT),
    "RerankRequest.template": Text(65536),
    "RerankRequest.top_n": Range(1),
    "RunOptions.priority": Range(-100, 100),
    "RunOptions.client_request_id": Text(128),
    "RunOptions.labels": Entries(16, Text(256), keys=Text(63)),
    # ---- tokenizer.proto
    "TokenizeRequest.model": _NAME,
    "DetokenizeRequest.model": _NAME,
    "DetokenizeRequest.token_ids": Entries(_TOKENS),
    # ---- adapters.proto
    "Adapter.name": _NAME,
    "Adapter.version": _NAME,
    "Adapter.base_model": _NAME,
    "Adapter.source": Text(8192),
    "Adapter.digest": Text(128),
    "Adapter.module_ranks": Entries(4096, keys=Text(256)),
    "Adapter.target_modules": Entries(4096, Text(256)),
    "Adapter.warnings": Entries(256, Text(4096)),
    "Adapter.labels": _LABELS,
    "Adapter.etag": _ETAG,
    "GetAdapterRequest.name": _NAME,
    "ListAdaptersRequest.parent": _NAME,
    "ListAdaptersRequest.page_size": _PAGE_SIZE,
    "ListAdaptersRequest.page_token": _PAGE_TOKEN,
    "ListAdaptersRequest.base_model": _NAME,
    "CreateAdapterRequest.parent": _NAME,
    "CreateAdapterRequest.adapter_id": _ID,
    "CreateAdapterRequest.wait": Seconds(0),
    "CreateAdapterRequest.request_id": _UUID,
    "UploadAdapterRequest.chunk": Text(1 << 20, unit="bytes"),
    "UploadFile.name": Text(256),
    "UploadFile.size_bytes": Range(1),
    "UpdateAdapterRequest.request_id": _UUID,
    "DeleteAdapterRequest.name": _NAME,
    "DeleteAdapterRequest.etag": _ETAG,
    "DeleteAdapterRequest.wait": Seconds(0),
    "DeleteAdapterRequest.request_id": _UUID,
    "LoadAdapterRequest.name": _NAME,
    "LoadAdapterRequest.wait": Seconds(0),
    "LoadAdapterRequest.request_id": _UUID,
    "UnloadAdapterRequest.name": _NAME,
    "UnloadAdapterRequest.wait": Seconds(0),
    "UnloadAdapterRequest.request_id": _UUID,
    "WatchAdaptersRequest.parent": _NAME,
    "WatchAdaptersRequest.base_model": _NAME,
    # ---- models.proto
    "GetModelRequest.name": _NAME,
    "ListModelsRequest.page_size": _PAGE_SIZE,
    "ListModelsRequest.page_token": _PAGE_TOKEN,
    "LoadModelRequest.name": _NAME,
    "LoadModelRequest.wait": Seconds(0),
    "LoadModelRequest.request_id": _UUID,
    "UnloadModelRequest.name": _NAME,
    "UnloadModelRequest.grace": Seconds(0),
    "UnloadModelRequest.wait": Seconds(0),
    "UnloadModelRequest.request_id": _UUID,
    "WatchModelsRequest.name": _NAME,
    # ---- routes.proto
    "Route.name": _NAME,
    "Route.targets": Entries(32),
    "Route.fallback": _NAME,
    "Route.labels": _LABELS,
    "Route.etag": _ETAG,
    "RouteTarget.model": _NAME,
    "RouteTarget.weight": Range(0),
    "GetRouteRequest.name": _NAME,
    "ListRoutesRequest.parent": _NAME,
    "ListRoutesRequest.page_size": _PAGE_SIZE,
    "ListRoutesRequest.page_token": _PAGE_TOKEN,
    "UpdateRouteRequest.request_id": _UUID,
    "DeleteRouteRequest.name": _NAME,
    "DeleteRouteRequest.etag": _ETAG,
    "DeleteRouteRequest.request_id": _UUID,
    "ResolveTargetRequest.parent": _NAME,
    "ResolveTargetRequest.model": _NAME,
    "ResolveTargetRequest.routing_key": Text(8192),
    # ---- server.proto
    "WatchLoadRequest.interval": Seconds(0.1, 60),
    "WatchUsageRequest.after_id": Text(128),
    # ---- types of google that the contract uses
    "Struct.fields": Entries(1024, keys=Text(1024)),
    "ListValue.values": Entries(4096),
    "Value.string_value": Text(1 << 20),
    "FieldMask.paths": Entries(16, Text(128)),
    "Status.message": Text(4096),
    "Status.details": Entries(16),
    "Any.type_url": Text(256),
    "Any.value": Text(4096, unit="bytes"),
}

TOTALS: Mapping[str, Total] = {
    "Chat": Total(characters=1 << 21, entries=4096),
    "Choices": Total(characters=65536, entries=256),
    "BatchGenerateRequest": Total(characters=1 << 22, entries=16384, numbers=1 << 19),
    "ScoreRequest": Total(characters=1 << 22, entries=16384, numbers=1 << 19),
    "EmbedRequest": Total(characters=1 << 22, entries=4096, numbers=1 << 19),
    "ClassifyRequest": Total(characters=1 << 22, entries=4096, numbers=1 << 19),
    "RerankRequest": Total(characters=1 << 22, entries=4096),
    "Adapter": Total(characters=1 << 20, entries=8192, numbers=4096),
}
