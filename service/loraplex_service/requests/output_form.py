"""The form in which the caller wants its outputs."""

import math
from dataclasses import dataclass

from loraplex.v1.generation_pb2 import GenerateSpec
from loraplex_service.requests.sampling import wants_logprobs
from loraplex_service.timestamps import duration_seconds

TOKENS_AT_ONCE = 256  # of an answer in one piece: they take less room in it than while they are held back


@dataclass(frozen=True, slots=True)
class OutputForm:
    """The parts of each output that go to the caller, and the stop strings."""

    text: bool
    token_ids: bool
    logprobs: bool
    prompt_token_ids: bool
    skip_special_tokens: bool
    stop: tuple[str, ...]
    include_stop: bool
    min_tokens: int  # before these no stop string counts
    fills_context: bool  # the output may be as long as the context leaves room for: running into that is its limit
    chunk_tokens: int  # hold tokens back until there are this many
    chunk_delay_seconds: float  # but no longer than this

    @classmethod
    def of(cls, spec: GenerateSpec, streaming: bool, max_tokens: int) -> "OutputForm":
        """`max_tokens`: the limit of each output."""
        output, stopping, stream = spec.output, spec.stopping, spec.stream
        text = output.text if output.HasField("text") else True
        delay = duration_seconds(stream.max_chunk_delay) if stream.HasField("max_chunk_delay") else 0.1
        return cls(
            text=text,
            token_ids=output.token_ids if output.HasField("token_ids") else not text,
            logprobs=wants_logprobs(output),
            prompt_token_ids=output.prompt_token_ids,
            skip_special_tokens=output.skip_special_tokens if output.HasField("skip_special_tokens") else True,
            stop=tuple(dict.fromkeys(stopping.stop)),
            include_stop=stopping.include_stop,
            min_tokens=stopping.min_tokens,
            fills_context=not stopping.HasField("max_tokens") or max_tokens < stopping.max_tokens,
            chunk_tokens=max(1, stream.min_tokens_per_chunk) if streaming else TOKENS_AT_ONCE,
            chunk_delay_seconds=delay if streaming else math.inf,
        )
