"""vllm.Inference: generations, by the servicers of the contract."""

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from loraplex.v1.inference_pb2 import Completed, Delta, Finished, PromptLogprobs, Started, TokenLogprob
from loraplex.v1.inference_pb2 import FinishReason as Reason
from loraplex_service.dialect_stubs import vllm_pb2_grpc
from loraplex_service.dialect_stubs.vllm_pb2 import (
    CandidateTokenInfo,
    FinishInfo,
    GenerateRequest,
    GenerateResponse,
    PromptInfo,
    SequenceOutput,
)
from loraplex_service.dialects.backend import Backend, Context
from loraplex_service.dialects.fields import Draft
from loraplex_service.dialects.vllm.fields import INFERENCE
from loraplex_service.errors import InvalidRequest

MAX_TOKENS = 20  # by default, as vLLM has it


class VllmInferenceServicer(vllm_pb2_grpc.InferenceServicer):
    """Streams what is new; a call for one answer gets it once all has come."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def Generate(self, request: GenerateRequest, context: Context) -> GenerateResponse:  # noqa: N802
        if request.sampling.num_sequences > 1:
            raise InvalidRequest.at("sampling.num_sequences", "is more than one: GenerateStream has several outputs")
        whole, texts, num_tokens = GenerateResponse(), list[str](), 0
        async with aclosing(self._responses(request, context, collected=True)) as responses:
            async for response in responses:
                texts.append(response.outputs.text)
                num_tokens += response.outputs.num_tokens
                whole.MergeFrom(response)  # which adds up lists alone
        whole.outputs.text, whole.outputs.num_tokens = "".join(texts), num_tokens
        return whole

    async def GenerateStream(  # noqa: N802
        self, request: GenerateRequest, context: Context
    ) -> AsyncGenerator[GenerateResponse, None]:
        async with aclosing(self._responses(request, context, collected=False)) as responses:
            async for response in responses:
                yield response

    async def _responses(
        self, request: GenerateRequest, context: Context, collected: bool
    ) -> AsyncGenerator[GenerateResponse, None]:
        draft = self._draft(request)
        parts = _Parts(request, draft.spec.output.logprob_token_ids)
        async with aclosing(self._backend.stream(draft, context, collected)) as events:
            async for event in events:
                response = parts.of(getattr(event, event.WhichOneof("event") or ""))
                if response is not None:
                    yield response

    def _draft(self, request: GenerateRequest) -> Draft:
        draft = Draft()
        INFERENCE.read(request, draft)
        self._backend.choose(draft, request.model, request.lora_name, "model", "lora_name")
        if not draft.spec.stopping.HasField("max_tokens"):
            draft.spec.stopping.max_tokens = max(MAX_TOKENS, draft.spec.stopping.min_tokens)
        if not draft.spec.output.HasField("text"):
            draft.spec.output.text = True
        draft.spec.output.token_ids = True  # of which each response has the number
        return draft


class _Parts:
    """Makes the responses of one request."""

    def __init__(self, request: GenerateRequest, named: Iterable[int]) -> None:
        """`named`: the tokens whose log-probabilities are asked for in each place."""
        self._wants = request.response
        self._named = tuple(named)
        self._prompt = PromptInfo()
        self._is_first = True

    def of(self, event: object) -> GenerateResponse | None:
        """The response for an event; None: there is nothing to tell yet."""
        match event:
            case Started():
                self._prompt.num_prompt_tokens = event.prompt_tokens
                self._prompt.token_ids.extend(event.prompt_token_ids)
            case PromptLogprobs():
                self._add_prompt(event.logprobs)
            case Delta():
                return self._response(_output(event, self._wants.output_token_ids, self._named))
            case Finished():
                return self._response(SequenceOutput(index=event.output_index, finish_info=_finish(event)))
            case Completed():
                return None
        return None

    def _response(self, output: SequenceOutput) -> GenerateResponse:
        response = GenerateResponse(outputs=output)
        if self._is_first:
            response.prompt_info.CopyFrom(self._prompt)
            self._is_first = False
        return response

    def _add_prompt(self, tokens: Iterable[TokenLogprob]) -> None:
        for token in tokens:
            self._prompt.logprobs.append(token.logprob)
            self._prompt.ranks.append(token.rank)
            self._prompt.candidate_tokens.append(_candidates(token, ()))


def _output(delta: Delta, with_tokens: bool, named: tuple[int, ...]) -> SequenceOutput:
    return SequenceOutput(
        index=delta.output_index,
        text=delta.text,
        num_tokens=len(delta.token_ids),
        token_ids=delta.token_ids if with_tokens else (),
        logprobs=[token.logprob for token in delta.logprobs],
        ranks=[token.rank for token in delta.logprobs],
        candidate_tokens=[_candidates(token, named) for token in delta.logprobs if token.top or token.named_logprobs],
    )


def _candidates(token: TokenLogprob, named: tuple[int, ...]) -> CandidateTokenInfo:
    """The likeliest tokens at a place, and those that were asked for by their ids."""
    info = CandidateTokenInfo.TokenInfo
    found = [info(id=top.token_id, logprob=top.logprob, rank=rank) for rank, top in enumerate(token.top, 1)]
    found += [info(id=which, logprob=logprob) for which, logprob in zip(named, token.named_logprobs, strict=True)]
    return CandidateTokenInfo(tokens=found)


def _finish(finished: Finished) -> FinishInfo:
    is_stop = finished.reason in (Reason.FINISH_REASON_STOP, Reason.FINISH_REASON_EOS)
    info = FinishInfo(
        num_output_tokens=finished.completion_tokens, finish_reason=FinishInfo.STOP if is_stop else FinishInfo.LENGTH
    )
    match finished.WhichOneof("matched"):
        case "stop":
            info.stop_string = finished.stop
        case "stop_token_id":
            info.stop_token_id = finished.stop_token_id
    return info
