"""Scores of candidates: how likely each is to follow a prompt, by requests that generate nothing."""

import asyncio
from collections.abc import Iterator, Sequence
from functools import partial

import msgspec

from loraplex.v1.generation_pb2 import AnyText, Constraint, GenerateSpec, OutputOptions, Stopping
from loraplex.v1.inference_pb2 import Candidate, CandidateScore, ScoreRequest, TokenLogprob
from loraplex_engine.link.client import EngineClient
from loraplex_engine.link.messages import AddRequest, TokenLogprobs
from loraplex_service.admission.tenants import Tenant
from loraplex_service.errors import InvalidRequest, MessageTooLarge
from loraplex_service.names.target import LoadedModel
from loraplex_service.requests.outputs import token_logprob
from loraplex_service.requests.prompts import TextWork, checked_tokens
from loraplex_service.requests.sampling import wants_logprobs
from loraplex_service.text import Tokenizer
from loraplex_service.text.errors import TextError, TooManyTokensError

LOGPROBS_AT_ONCE = 256  # of an answer, before other tasks get a turn: half a millisecond
TOP_BYTES = 9  # of one of the likeliest tokens at a place, at least, but for one of them
NAMED_BYTES = 4  # of the log-probability of a named token


def scoring_spec(request: ScoreRequest) -> GenerateSpec:
    """The spec of a generation that only reads what is scored."""
    spec = GenerateSpec()
    spec.CopyFrom(request.spec)
    spec.stopping.CopyFrom(Stopping(max_tokens=0))
    spec.constraint.CopyFrom(Constraint(any_text=AnyText()))
    asked = request.spec.output
    spec.output.CopyFrom(
        OutputOptions(
            text=False,
            token_ids=False,
            prompt_logprobs=asked.top_logprobs,
            logprob_token_ids=asked.logprob_token_ids,
        )
    )
    return spec


async def candidate_tokens(
    candidates: Sequence[Candidate], room: int, model: LoadedModel, work: TextWork, tenant: Tenant
) -> list[list[int]]:
    """The tokens of each candidate, at least one. `room`: what the prompt leaves of the context.

    Raises InvalidRequest, Unavailable.
    """
    found: list[list[int]] = []
    for index, candidate in enumerate(candidates):
        path = f"candidates[{index}].{candidate.WhichOneof('content')}"
        if candidate.HasField("token_ids"):
            ids = candidate.token_ids.ids
            if len(ids) > room:
                raise InvalidRequest.at(path, f"has {len(ids)} tokens, and the prompt leaves {room} of the context")
            tokens = await work.on_tokens(tenant, len(ids), checked_tokens(ids, model, path))
        else:
            text = candidate.text
            size = len(text.encode(errors="surrogatepass"))
            tokens = await work.on(tenant, size, partial(_encoded, text, room, model, path))
        found.append(tokens)
    return found


def _encoded(text: str, room: int, model: LoadedModel, path: str) -> list[int]:
    try:
        tokens = model.tokenizer.encode(text, False, room)
    except TooManyTokensError as error:
        problem = f"has {error.count} tokens, and the prompt leaves {room} of the context"
        raise InvalidRequest.at(path, problem) from error
    except TextError as error:
        raise InvalidRequest.at(path, str(error)) from error
    if not tokens:
        raise InvalidRequest.at(path, "comes to no tokens at all; give at least one")
    if (largest := max(tokens)) >= model.limits.vocab_size:
        raise InvalidRequest.at(path, f"holds {largest}, and the vocabulary has {model.limits.vocab_size} tokens")
    return tokens


def scoring_sequences(first: AddRequest, candidates: Sequence[list[int]], client: EngineClient) -> list[AddRequest]:
    """A request to the engine for each candidate, of which `first` has the prompt."""
    prompt = first.prompt_token_ids
    sampling = msgspec.structs.replace(first.sampling, prompt_logprobs_from=len(prompt))
    return [
        msgspec.structs.replace(
            first, request_id=client.requests.new_id(), prompt=prompt + candidate, sampling=sampling
        )
        for candidate in candidates
    ]


def check_size(candidates: Sequence[list[int]], output: OutputOptions, most_bytes: int) -> None:
    """Raise MessageTooLarge for an answer that is certain to be too large, before an engine computes it.

    `output`: of the scoring spec.
    """
    of_token = TOP_BYTES * max(output.prompt_logprobs - 1, 0) + NAMED_BYTES * len(output.logprob_token_ids)
    size = sum(map(len, candidates)) * of_token
    if size > most_bytes:
        raise MessageTooLarge.answer(size, most_bytes)


class CandidateScores:
    """The answer, candidate by candidate, as each has been read: what engines say of it is larger, and not kept."""

    def __init__(self, count: int, output: OutputOptions, most_bytes: int) -> None:
        self.found = [CandidateScore() for _ in range(count)]
        self._wants_tokens = wants_logprobs(output)
        self._most_bytes = most_bytes
        self._size = 0

    async def add(self, index: int, entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> None:
        """Take what an engine says of a candidate, in turns with other tasks. Raises MessageTooLarge."""
        score = self.found[index]
        score.logprob, score.num_tokens = sum(entry.logprob for entry in entries), len(entries)
        for some in self._parts(entries, tokenizer):
            score.token_logprobs.extend(some)
            self._size += sum(each.ByteSize() for each in some)
            if self._size > self._most_bytes:
                raise MessageTooLarge.answer(self._size, self._most_bytes)
            await asyncio.sleep(0)

    def _parts(self, entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> Iterator[list[TokenLogprob]]:
        """What is told of the tokens, as much at a time as is made before other tasks get a turn."""
        if self._wants_tokens and entries:
            widest = max(1 + len(entry.top_ids) + len(entry.named_logprobs) for entry in entries)
            step = max(1, LOGPROBS_AT_ONCE // widest)
            for start in range(0, len(entries), step):
                yield [token_logprob(entry, tokenizer) for entry in entries[start : start + step]]
