"""What calls and generations add up to, by tenant, model and adapter."""

from collections.abc import Mapping

from service.call import Call
from service.telemetry.records import CallRecord, GenerationRecord
from service.telemetry.series import TOKEN_BUCKETS, Counter, Histogram


class RequestMetrics:
    """An observer that counts. Labels are (tenant, model, adapter) for usage, (model,) for times."""

    def __init__(self) -> None:
        self.requests = Counter()  # (tenant, model, adapter, status)
        self.prompt_tokens = Counter()
        self.cached_prompt_tokens = Counter()
        self.completion_tokens = Counter()
        self.finished = Counter()  # (model, finish reason)
        self.duration = Histogram()
        self.first_token = Histogram()
        self.per_token = Histogram(TOKEN_BUCKETS)  # of a generation: the mean
        self.token_gaps = Histogram(TOKEN_BUCKETS)  # each; observed by generations while they run
        self.queue = Histogram()
        self.adapter_wait = Histogram()
        self.calls = Histogram()  # (method, status)

    def call_started(self, call: Call, method: str, metadata: Mapping[str, str]) -> None:
        pass

    def call_ended(self, call: Call, record: CallRecord) -> None:
        self.calls.observe((record.method, record.status), record.seconds)

    def generation_ended(self, call: Call, record: GenerationRecord) -> None:
        model = record.model.removeprefix("models/")
        user = (record.tenant, model, record.adapter)
        self.requests.add((*user, record.status))
        self.prompt_tokens.add(user, record.prompt_tokens)
        self.cached_prompt_tokens.add(user, record.cached_prompt_tokens)
        self.completion_tokens.add(user, record.completion_tokens)
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
