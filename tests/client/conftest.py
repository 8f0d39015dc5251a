"""A real gRPC server in the test's own event loop, whose answers can be worked out by hand."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2_grpc

from loraplex import AsyncAdminClient, AsyncClient
from loraplex.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    models_pb2,
    models_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from tests.waits import MOST_SECONDS

Context = Any  # grpc.aio.ServicerContext of whichever request and response


def status_of(code: int, message: str, details: Iterable[Message] = ()) -> status_pb2.Status:
    packed = []
    for detail in details:
        packed.append(any_pb2.Any())
        packed[-1].Pack(detail)
    return status_pb2.Status(code=code, message=message, details=packed)


async def fail(context: Context, status: status_pb2.Status) -> None:
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, (("grpc-status-details-bin", status.SerializeToString()),))


class FakeInference(inference_pb2_grpc.InferenceServiceServicer):
    """Says the prompt back, one word an event. Prompts with a meaning of their own:

    "endless": says "again " for ever; "cut": never says Completed; "fail": fails after the first word.
    """

    def __init__(self) -> None:
        self.specs: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.failures: list[status_pb2.Status] = []  # the statuses of the next calls, before anything is sent
        self.cancelled = asyncio.Event()  # set when a handler sees its call cancelled

    def fail_next(self, code: int, times: int = 1) -> None:
        """Refuse the next calls with this code, and ask for two seconds of patience."""
        retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2))
        self.failures += [status_of(code, "not now", [retry])] * times

    async def _admit(self, spec: Any, context: Context) -> None:
        self.specs.append(spec)
        self.metadata.append(dict(context.invocation_metadata()))
        if self.failures:
            await fail(context, self.failures.pop(0))

    async def Generate(self, request: Any, context: Context) -> inference_pb2.GenerateResponse:  # noqa: N802
        await self._admit(request.spec, context)
        words = request.spec.prompt.text.split()
        return inference_pb2.GenerateResponse(
            request_id="r1",
            outputs=[inference_pb2.GenerateOutput(text=" ".join(words))],
            usage=inference_pb2.Usage(completion_tokens=len(words)),
        )

    async def StreamGenerate(  # noqa: N802
        self, request: Any, context: Context
    ) -> AsyncIterator[inference_pb2.StreamGenerateResponse]:
        await self._admit(request.spec, context)
        try:
            for seq, event in enumerate([message async for message in self._events(request.spec.prompt.text)]):
                yield inference_pb2.StreamGenerateResponse(seq=seq, **event)
            if request.spec.prompt.text == "endless":
                while True:
                    yield inference_pb2.StreamGenerateResponse(delta=inference_pb2.Delta(text="again "))
                    await asyncio.sleep(0)
            if request.spec.prompt.text == "fail":
                usage = inference_pb2.PartialUsage(request_id="r1", usage=inference_pb2.Usage(completion_tokens=1))
                await fail(context, status_of(code_pb2.UNAVAILABLE, "the engine ended", [usage]))
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def _events(self, text: str) -> AsyncIterator[dict[str, Any]]:
        yield {"started": inference_pb2.Started(request_id="r1", prompt_tokens=len(text.split()))}
        if text in ("endless", "fail"):
            yield {"delta": inference_pb2.Delta(text="first ")}
            return
        for token_id, word in enumerate(text.split()):
            yield {"delta": inference_pb2.Delta(text=word + " ", token_ids=[token_id])}
        yield {"finished": inference_pb2.Finished(reason=inference_pb2.FINISH_REASON_EOS)}
        if text != "cut":
            yield {"completed": inference_pb2.Completed(usage=inference_pb2.Usage(completion_tokens=2), seed=7)}

    async def BatchGenerate(  # noqa: N802
        self, request: Any, context: Context
    ) -> AsyncIterator[inference_pb2.BatchGenerateResponse]:
        for index, spec in reversed(list(enumerate(request.specs))):
            if spec.prompt.text == "bad":
                error = status_of(code_pb2.INVALID_ARGUMENT, "bad prompt")
                yield inference_pb2.BatchGenerateResponse(index=index, error=error)
            else:
                output = inference_pb2.GenerateOutput(text=spec.prompt.text)
                response = inference_pb2.GenerateResponse(outputs=[output])
                yield inference_pb2.BatchGenerateResponse(index=index, response=response)


class FakeTokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """A token is the code point of a character."""

    async def Tokenize(self, request: Any, context: Context) -> tokenizer_pb2.TokenizeResponse:  # noqa: N802
        return tokenizer_pb2.TokenizeResponse(token_ids=[ord(character) for character in request.prompt.text])

    async def Detokenize(self, request: Any, context: Context) -> tokenizer_pb2.DetokenizeResponse:  # noqa: N802
        return tokenizer_pb2.DetokenizeResponse(text="".join(chr(token) for token in request.token_ids))


class FakeModels(models_pb2_grpc.ModelServiceServicer):
    """Five models, which come in pages of two; "models/broken" fails to load."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.watch_cancelled = asyncio.Event()

    async def ListModels(self, request: Any, context: Context) -> models_pb2.ListModelsResponse:  # noqa: N802
        first = int(request.page_token or 0)
        return models_pb2.ListModelsResponse(
            models=[models_pb2.Model(name=f"models/m{i}") for i in range(first, min(first + 2, 5))],
            next_page_token=str(first + 2) if first + 2 < 5 else "",
        )

    async def LoadModel(self, request: Any, context: Context) -> models_pb2.Model:  # noqa: N802
        self.requests.append(request)
        if request.name == "models/broken":
            error = status_of(code_pb2.FAILED_PRECONDITION, "no weights")
            return models_pb2.Model(name=request.name, state=models_pb2.Model.STATE_FAILED, error=error)
        return models_pb2.Model(name=request.name, state=models_pb2.Model.STATE_ACTIVE)

    async def WatchModels(  # noqa: N802
        self, request: Any, context: Context
    ) -> AsyncIterator[models_pb2.WatchModelsResponse]:
        try:
            while True:
                yield models_pb2.WatchModelsResponse(model=models_pb2.Model(name="models/m0"))
                await asyncio.sleep(0)
        except (asyncio.CancelledError, GeneratorExit):
            self.watch_cancelled.set()
            raise


class FakeAdapters(adapters_pb2_grpc.AdapterServiceServicer):
    """Takes uploads: the digest of an adapter is the names and lengths of its files."""

    def __init__(self) -> None:
        self.requests: list[Any] = []

    async def UploadAdapter(self, requests: Any, context: Context) -> adapters_pb2.Adapter:  # noqa: N802
        lengths: dict[str, int] = {}
        async for request in requests:
            match request.WhichOneof("payload"):
                case "header":
                    self.requests.append(request.header)
                case "file":
                    lengths[request.file.name] = 0
                case "chunk":
                    lengths[list(lengths)[-1]] += len(request.chunk)
        header = self.requests[-1]
        return adapters_pb2.Adapter(
            name=f"{header.parent}/adapters/{header.adapter_id}",
            digest=",".join(f"{name}={length}" for name, length in lengths.items()),
        )


class FakeServer:
    """All fakes behind one port, which stands for both ports of a real server."""

    def __init__(self) -> None:
        # The methods that a fake lacks answer UNIMPLEMENTED.
        self.inference = FakeInference()  # type: ignore[abstract]
        self.models = FakeModels()  # type: ignore[abstract]
        self.adapters = FakeAdapters()  # type: ignore[abstract]
        self.health = health.aio.HealthServicer()
        self.address = ""

    async def start(self) -> grpc.aio.Server:
        # Without so_reuseport=0 two servers could share the port without a word.
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        inference_pb2_grpc.add_InferenceServiceServicer_to_server(self.inference, server)
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(FakeTokenizer(), server)
        models_pb2_grpc.add_ModelServiceServicer_to_server(self.models, server)
        adapters_pb2_grpc.add_AdapterServiceServicer_to_server(self.adapters, server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        self.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        await server.start()
        return server


@pytest.fixture
async def server() -> AsyncIterator[FakeServer]:
    fake = FakeServer()
    running = await fake.start()
    yield fake
    await running.stop(None)


@pytest.fixture
def adapter_directory(tmp_path: Path) -> Path:
    """Files with the names of an adapter; the second one needs three chunks."""
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * (2 * 1024 * 1024 + 5))
    return tmp_path


@pytest.fixture
async def client(server: FakeServer) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(server.address, timeout=MOST_SECONDS) as client:
        yield client


@pytest.fixture
async def admin(server: FakeServer) -> AsyncIterator[AsyncAdminClient]:
    async with AsyncAdminClient(server.address, timeout=MOST_SECONDS) as admin:
        yield admin
