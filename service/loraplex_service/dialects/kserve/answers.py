"""What was generated, in tensors."""

import json
from collections.abc import Iterable

from loraplex.v1.inference_pb2 import (
    Completed,
    Delta,
    Finished,
    GenerateResponse,
    Started,
    StreamGenerateResponse,
    TokenLogprob,
)
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_service.dialect_stubs.kserve_v2_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from loraplex_service.dialects.kserve.tensors import FINAL, Asked, add_output
from loraplex_service.http.answers import FINISH_REASONS


class Answers:
    """Makes the responses to one request."""

    def __init__(self, request: ModelInferRequest, asked: Asked) -> None:
        self._request = request
        self._asked = asked
        self._version = request.model_version
        self._prompt_tokens = 0
        self._logprob = 0.0  # of a stream: so far
        self._has_begun = False

    def whole(self, response: GenerateResponse) -> ModelInferResponse:
        """The response with all outputs."""
        self._begin(response.target, response.usage.prompt_tokens)
        outputs = response.outputs
        before = "" if self._asked.excludes_input else self._asked.text
        return self._response(
            [before + output.text for output in outputs],
            [FINISH_REASONS[output.finished.reason] for output in outputs],
            [sum(token.logprob for token in output.logprobs) for output in outputs],
            [_logprobs(output.logprobs) for output in outputs],
            [output.finished.completion_tokens for output in outputs],
        )

    def part(self, event: StreamGenerateResponse) -> ModelInferResponse | None:
        """The response for an event of a stream; None: there is nothing to tell."""
        match getattr(event, event.WhichOneof("event") or ""):
            case Started() as started:
                self._begin(started.target, started.prompt_tokens)
            case Delta() as delta:
                self._logprob += sum(token.logprob for token in delta.logprobs)
                return self._one(delta.text, "", _logprobs(delta.logprobs), len(delta.token_ids))
            case Finished() as finished if "finish_reason" in self._asked.outputs or not self._has_begun:
                return self._one("", FINISH_REASONS[finished.reason], "[]", 0)
            case Completed() if self._asked.says_the_end:
                return self.end()
        return None

    def end(self) -> ModelInferResponse:
        """The empty response that says that there are no more."""
        return ModelInferResponse(
            model_name=self._request.model_name,
            model_version=self._version,
            id=self._request.id,
            parameters={FINAL: InferParameter(bool_param=True)},
        )

    def _begin(self, target: ResolvedTarget, prompt_tokens: int) -> None:
        self._version = target.adapter_version.rpartition("@")[2] if "+" not in target.adapter_version else ""
        self._prompt_tokens = prompt_tokens

    def _one(self, text: str, reason: str, logprobs: str, tokens: int) -> ModelInferResponse:
        return self._response([text], [reason], [self._logprob], [logprobs], [tokens])

    def _response(
        self, texts: list[str], reasons: list[str], sums: list[float], logprobs: list[str], tokens: list[int]
    ) -> ModelInferResponse:
        self._has_begun = True
        response = self.end()
        if self._asked.says_the_end:
            response.parameters[FINAL].bool_param = False
        else:
            response.parameters.clear()
        values: dict[str, list[str] | list[float] | list[int]] = {
            "text_output": texts,
            "finish_reason": reasons,
            "cumulative_logprob": sums,
            "logprobs": logprobs,
            "num_input_tokens": [self._prompt_tokens],
            "num_output_tokens": tokens,
        }
        for name in dict.fromkeys(self._asked.outputs):
            add_output(response, name, values[name])
        return response


def _logprobs(tokens: Iterable[TokenLogprob]) -> str:
    """As Triton's vLLM backend has them: for each token a JSON object of the likeliest and itself, by their ids."""
    return json.dumps([_place(token) for token in tokens], ensure_ascii=False)


def _place(token: TokenLogprob) -> dict[str, dict[str, object]]:
    place = {
        str(top.token_id): {"logprob": top.logprob, "rank": rank, "decoded_token": top.text}
        for rank, top in enumerate(token.top, 1)
    }
    own: dict[str, object] = {"logprob": token.logprob, "rank": token.rank, "decoded_token": token.text}
    return {**place, str(token.token_id): own}
