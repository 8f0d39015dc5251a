"""TokenizerService: text to the tokens that a model would see, and back."""

from typing import Any

import grpc.aio

from loraplex.v1 import tokenizer_pb2_grpc
from loraplex.v1.tokenizer_pb2 import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from loraplex_service.adapters.texts import AdapterTexts
from loraplex_service.admission.tenants import Tenants
from loraplex_service.call import current_call
from loraplex_service.errors import InvalidRequest
from loraplex_service.names.catalog import Catalog
from loraplex_service.names.target import LoadedModel
from loraplex_service.requests.prompts import (
    PIECE,
    PromptText,
    TextWork,
    adds_special_tokens,
    kept_parts,
    pieces_of,
    prompt_text,
)
from loraplex_service.requests.turns import Pieces
from loraplex_service.text import Encoding, IncrementalDetokenizer, TextError

Context = grpc.aio.ServicerContext[Any, Any]


MAX_OFFSETS_BYTES = 32 << 10  # of a text whose tokens' places are told
MAX_TEXT_CHARS = 2 << 20  # of detokenised text


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Serves the tokenizers of loaded models, and of adapters that bring tokens or a template of their own."""

    def __init__(self, catalog: Catalog, texts: TextWork, tenants: Tenants, adapter_texts: AdapterTexts) -> None:
        self._catalog = catalog
        self._adapter_texts = adapter_texts
        self._texts = texts
        self._tenants = tenants

    async def Tokenize(self, request: TokenizeRequest, context: Context) -> TokenizeResponse:  # noqa: N802
        tenant = self._tenants.get(current_call().tenant)
        model = await self._model(request.model)
        text = await prompt_text(request.prompt, model, self._texts, tenant, "prompt")
        size = len(text.text.encode(errors="surrogatepass"))
        if request.include_offsets and size > MAX_OFFSETS_BYTES:
            problem = f"are given for texts of at most {MAX_OFFSETS_BYTES} bytes; this one has {size}"
            raise InvalidRequest.at("include_offsets", problem)
        run = self._texts.on_places if request.include_offsets else self._texts.on
        try:
            encoding = await run(tenant, text.work_size, lambda: _encoding(request, model, text))
        except TextError as error:
            raise InvalidRequest.at("prompt", str(error)) from error
        return await self._texts.on_tokens(tenant, len(encoding.token_ids), _told(request, model, text.text, encoding))

    async def Detokenize(self, request: DetokenizeRequest, context: Context) -> DetokenizeResponse:  # noqa: N802
        tenant = self._tenants.get(current_call().tenant)
        model = await self._model(request.model)
        return await self._texts.on_tokens(tenant, len(request.token_ids), _detokenized(request, model))

    async def _model(self, name: str) -> LoadedModel:
        target = self._catalog.resolve(current_call().tenant, name, "model")
        return (await self._adapter_texts.dressed(target)).model


def _encoding(request: TokenizeRequest, model: LoadedModel, prompt: PromptText) -> Encoding:
    """The tokens of a text, without their places where nobody asks for them. Raises TextError."""
    special, (text, literal) = adds_special_tokens(request.prompt), prompt
    if request.include_offsets:
        return model.tokenizer.encode_with_offsets(text, special, literal)
    return Encoding(model.tokenizer.encode(text, special, literal=literal), [])


def _told(request: TokenizeRequest, model: LoadedModel, text: str, encoding: Encoding) -> Pieces[TokenizeResponse]:
    response = TokenizeResponse(max_context_tokens=model.limits.max_model_len)
    for part in kept_parts(request.prompt, model, encoding.token_ids):
        first, end, _ = part.indices(len(encoding.token_ids))
        for place in range(first, end, PIECE):
            some = slice(place, min(place + PIECE, end))
            response.token_ids.extend(encoding.token_ids[some])
            response.token_starts.extend([start for start, _ in encoding.offsets[some]])
            response.token_ends.extend([end for _, end in encoding.offsets[some]])
            yield
    if request.include_text:
        response.text = text
    return response


def _detokenized(request: DetokenizeRequest, model: LoadedModel) -> Pieces[DetokenizeResponse]:
    """Raises InvalidRequest."""
    skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
    detokenizer = IncrementalDetokenizer(model.tokenizer.pieces(skip))
    text: list[str] = []
    length = 0
    for token_ids in pieces_of(request.token_ids, model, "token_ids"):
        text.append(detokenizer.push(token_ids))
        length += len(text[-1])
        if length > MAX_TEXT_CHARS:
            raise InvalidRequest.at("token_ids", f"come to more than {MAX_TEXT_CHARS} characters of text")
        yield
    return DetokenizeResponse(text="".join([*text, detokenizer.flush()]))
