"""Sums over calls and generations, by tenant, model and adapter."""

from collections.abc import Callable, Mapping

from loraplex_service.call import Call
from loraplex_service.telemetry.lag import LAG_BUCKETS
from loraplex_service.telemetry.records import CallRecord, GenerationRecord
from loraplex_service.telemetry.series import TOKEN_BUCKETS, Counter, Histogram, Labels


class UsageCounters:
    """Counters of ended generations and of their tokens, by any labels."""

    def __init__(self) -> None:
        self.requests = Counter()  # has the status as one more label, the last
        self.prompt_tokens = Counter()
        self.cached_prompt_tokens = Counter()
        self.completion_tokens = Counter()

    def add(self, labels: Labels, record: GenerationRecord) -> None:
        self.requests.add((*labels, record.status))
        self.prompt_tokens.add(labels, record.prompt_tokens)
        self.cached_prompt_tokens.add(labels, record.cached_prompt_tokens)
        self.completion_tokens.add(labels, record.completion_tokens)

    def drop(self, is_gone: Callable[[Labels], bool]) -> None:
        for counter in (self.requests, self.prompt_tokens, self.cached_prompt_tokens, self.completion_tokens):
            counter.drop(is_gone)


class RequestMetrics:
    """An observer that counts calls and generations. Times have the label (model,)."""

    def __init__(self) -> None:
        self.tenants = UsageCounters()  # (tenant, model)
        self.adapters = UsageCounters()  # (tenant, model, adapter): of a weighted sum, each of its adapters
        self.finished = Counter()  # (model, finish reason)
        self.duration = Histogram()
        self.first_token = Histogram()
        self.per_token = Histogram(TOKEN_BUCKETS)  # of a generation: the mean
        self.token_gaps = Histogram(TOKEN_BUCKETS)  # each; observed by generations while they run
        self.queue = Histogram()
        self.adapter_wait = Histogram()
        self.adapter_loads = Histogram()  # into host memory, from order to answer
        self.calls = Histogram()  # (method, status)
        self.loop_lag = Histogram(LAG_BUCKETS)  # ()
        self.http_requests = Counter()  # (endpoint, status): the HTTP process tells them
        self.form_checks = Counter()  # (outcome,): read, kept, refused

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        pass

    def call_ended(self, call: Call, record: CallRecord) -> None:
        self.calls.observe((record.method, record.status), record.seconds)

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        model = record.model.removeprefix("models/")
        self.tenants.add((record.tenant, model), record)
        for adapter in record.adapter_names or ("",):
            self.adapters.add((record.tenant, model, adapter), record)
        for reason in record.finish_reasons:
            self.finished.add((model, reason.lower()))
        self.duration.observe((model,), record.seconds)
        if record.queue_seconds is not None:
            self.queue.observe((model,), record.queue_seconds)
        if record.adapter_load_seconds > 0:
            self.adapter_wait.observe((model,), record.adapter_load_seconds)
        if record.first_token_seconds is not None:
            self.first_token.observe((model,), record.first_token_seconds)
        if record.seconds_per_token is not None:
            self.per_token.observe((model,), record.seconds_per_token)

    def adapter_removed(self, name: str) -> None:
        """Drop the adapter's series, to make room for others: the number of series is limited."""
        self.adapters.drop(lambda labels: labels[2] == name)
