"""TokenizerService: text to the tokens that a model would see, and back."""

import asyncio
from typing import Any

import grpc.aio

from loraplex.v1 import tokenizer_pb2_grpc
from loraplex.v1.tokenizer_pb2 import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
    TokenOffset,
)
from service.call import current_call
from service.catalog import Catalog, LoadedModel
from service.errors import InvalidRequest
from service.prompts import adds_special_tokens, prompt_text
from service.text import TemplateRenderer, TextError

Context = grpc.aio.ServicerContext[Any, Any]


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """The tokenizers of the loaded models."""

    def __init__(self, catalog: Catalog, renderer: TemplateRenderer) -> None:
        self._catalog = catalog
        self._renderer = renderer

    async def Tokenize(self, request: TokenizeRequest, context: Context) -> TokenizeResponse:  # noqa: N802
        prompt = request.prompt
        model = self._model(request.model)
        text = await prompt_text(prompt, model, self._renderer, "prompt")
        special = adds_special_tokens(prompt)
        try:
            encoding = await asyncio.to_thread(model.tokenizer.encode_with_offsets, text, special)
        except TextError as error:
            raise InvalidRequest.at("prompt", str(error)) from error
        kept = slice(-prompt.truncate_to_tokens or None, None)
        response = TokenizeResponse(token_ids=encoding.token_ids[kept], max_context_tokens=model.limits.max_model_len)
        if request.include_offsets:
            response.offsets.extend(TokenOffset(start=start, end=end) for start, end in encoding.offsets[kept])
        if request.include_text:
            response.text = text
        return response

    async def Detokenize(self, request: DetokenizeRequest, context: Context) -> DetokenizeResponse:  # noqa: N802
        model = self._model(request.model)
        largest = max(request.token_ids, default=0)
        if largest >= model.limits.vocab_size:
            raise InvalidRequest.at(
                "token_ids", f"holds {largest}, and the vocabulary has {model.limits.vocab_size} tokens"
            )
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        text = await asyncio.to_thread(model.tokenizer.decode, list(request.token_ids), skip)
        return DetokenizeResponse(text=text)

    def _model(self, name: str) -> LoadedModel:
        return self._catalog.resolve(current_call().tenant, name, "model").model
