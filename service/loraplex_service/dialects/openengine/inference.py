"""openengine.v1.Inference: generations, by the servicers of the contract."""

from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing

from loraplex.v1.inference_pb2 import Completed, Delta, Finished, PromptLogprobs, Started, TokenLogprob
from loraplex.v1.inference_pb2 import FinishReason as Reason
from loraplex_service.call import current_call
from loraplex_service.call_errors import known_error
from loraplex_service.dialect_stubs import openengine_pb2_grpc
from loraplex_service.dialect_stubs.openengine_pb2 import (
    ERROR_CODE_CANCELLED,
    ERROR_CODE_DRAINING,
    ERROR_CODE_INTERNAL,
    ERROR_CODE_INVALID_ARGUMENT,
    ERROR_CODE_MODEL_NOT_FOUND,
    ERROR_CODE_OVERLOADED,
    ERROR_CODE_UNSPECIFIED,
    ERROR_CODE_UNSUPPORTED_FEATURE,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    EngineError,
    ErrorCode,
    GenerateRequest,
    GenerateResponse,
    GenerationFinished,
    LogProb,
    PromptOutput,
    StopMatch,
    TokenInfo,
    TokenOutput,
    Usage,
)
from loraplex_service.dialects.backend import Backend, Context
from loraplex_service.dialects.fields import Draft
from loraplex_service.dialects.openengine.fields import GENERATE
from loraplex_service.errors import FeatureUnsupported, InvalidRequest, LoraplexError, Unavailable, to_status

_PRIORITY = "openengine-priority"
_RANK = "openengine-target-dp-rank"
_CODES: Mapping[str, ErrorCode.ValueType] = {
    "INVALID_PARAMETER": ERROR_CODE_INVALID_ARGUMENT,
    "PROMPT_TOO_LONG": ERROR_CODE_INVALID_ARGUMENT,
    "FEATURE_UNSUPPORTED": ERROR_CODE_UNSUPPORTED_FEATURE,
    "MODEL_NOT_FOUND": ERROR_CODE_MODEL_NOT_FOUND,
    "ADAPTER_NOT_FOUND": ERROR_CODE_MODEL_NOT_FOUND,
    "OVERLOADED": ERROR_CODE_OVERLOADED,
    "CANCELLED": ERROR_CODE_CANCELLED,
    "DRAINING": ERROR_CODE_DRAINING,
    "ENGINE_ERROR": ERROR_CODE_INTERNAL,
}


class OpenEngineInferenceServicer(openengine_pb2_grpc.InferenceServicer):
    """What fails before it is accepted ends with a status, what fails later with an error in the stream."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def Generate(  # noqa: N802
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateResponse, None]:
        draft = Draft()
        GENERATE.read(request, draft)
        self._backend.choose(draft, request.model, request.lora_name, "model", "lora_name")
        _take_metadata(draft, context)
        draft.spec.output.text = draft.spec.output.token_ids = True
        answers = _Answers(request.request_id or current_call().request_id, draft.spec.output.logprob_token_ids)
        accepted = False
        try:
            async with aclosing(self._backend.stream(draft, context)) as events:
                async for event in events:
                    accepted = True
                    for response in answers.of(getattr(event, event.WhichOneof("event") or "")):
                        yield response
        except Exception as error:
            if not accepted:
                raise
            yield answers.failed(known_error(error, current_call(), "openengine.v1.Inference/Generate"))


def _take_metadata(draft: Draft, context: Context) -> None:
    """Take what OpenEngine has in the metadata of a call. Raises InvalidRequest, FeatureUnsupported."""
    metadata = {str(key): str(value) for key, value in context.invocation_metadata() or ()}
    if "openengine-routing-key" in metadata:
        current_call().routing_key = metadata["openengine-routing-key"]
    if metadata.get(_RANK, "0") != "0":
        raise FeatureUnsupported(_RANK, "there is one rank, 0")
    if _PRIORITY in metadata:
        try:
            draft.spec.priority = int(metadata[_PRIORITY])
        except ValueError:
            raise InvalidRequest.at(_PRIORITY, "must be a whole number") from None
        draft.names.append(("priority", _PRIORITY))


class _Answers:
    """Makes the responses of one request."""

    def __init__(self, request_id: str, named: Iterable[int]) -> None:
        """`named`: the tokens whose log-probabilities are asked for in each place."""
        self._id = request_id
        self._named = tuple(named)
        self._prompt: list[TokenInfo] = []
        self._ended: list[GenerateResponse] = []  # held back: the last one has the usage

    def of(self, event: object) -> list[GenerateResponse]:
        """The responses for an event. The prompt's tokens come in one, before anything else."""
        match event:
            case PromptLogprobs():
                self._prompt += [_token(token, self._named if token.named_logprobs else ()) for token in event.logprobs]
            case Delta():
                return [*self._of_prompt(), GenerateResponse(request_id=self._id, token=_output(event, self._named))]
            case Finished():
                ready, self._ended = self._ended, [GenerateResponse(request_id=self._id, finished=_finished(event))]
                return [*self._of_prompt(), *ready]
            case Completed():
                self._ended[-1].usage.CopyFrom(_usage(event))
                return self._ended
            case Started():
                pass
        return []

    def failed(self, error: LoraplexError) -> GenerateResponse:
        """The last response of a request that was accepted and failed."""
        code = _CODES.get(error.reason, ERROR_CODE_UNSPECIFIED)
        message = f"[{error.reason}] {to_status(error, current_call().request_id).message}"
        failure = EngineError(code=code, message=message, retryable=isinstance(error, Unavailable))
        return GenerateResponse(request_id=self._id, error=failure)

    def _of_prompt(self) -> list[GenerateResponse]:
        tokens, self._prompt = self._prompt, []
        return [GenerateResponse(request_id=self._id, prompt=PromptOutput(tokens=tokens))] if tokens else []


def _output(delta: Delta, named: tuple[int, ...]) -> TokenOutput:
    if delta.logprobs:
        tokens = [_token(token, named) for token in delta.logprobs]
    else:
        tokens = [TokenInfo(token_id=token_id) for token_id in delta.token_ids]
    return TokenOutput(output_index=delta.output_index, tokens=tokens, text=delta.text)


def _token(token: TokenLogprob, named: tuple[int, ...]) -> TokenInfo:
    found = [
        LogProb(token_id=top.token_id, logprob=top.logprob, token=top.text, rank=rank)
        for rank, top in enumerate(token.top, 1)
    ]
    found += [
        LogProb(token_id=which, logprob=logprob) for which, logprob in zip(named, token.named_logprobs, strict=True)
    ]
    info = TokenInfo(token_id=token.token_id, token=token.text, candidates=found)
    if token.HasField("logprob"):
        info.logprob = token.logprob
    if token.HasField("rank"):
        info.rank = token.rank
    return info


def _finished(finished: Finished) -> GenerationFinished:
    is_stop = finished.reason in (Reason.FINISH_REASON_STOP, Reason.FINISH_REASON_EOS)
    found = GenerationFinished(
        output_index=finished.output_index,
        reason=FINISH_REASON_STOP if is_stop else FINISH_REASON_LENGTH,
        message=Reason.Name(finished.reason).removeprefix("FINISH_REASON_"),
    )
    match finished.WhichOneof("matched"):
        case "stop":
            found.stop_match.CopyFrom(StopMatch(stop_text=finished.stop))
        case "stop_token_id":
            found.stop_match.CopyFrom(StopMatch(stop_token_id=finished.stop_token_id))
    return found


def _usage(completed: Completed) -> Usage:
    usage = completed.usage
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        cached_prompt_tokens=usage.cached_prompt_tokens,
    )
