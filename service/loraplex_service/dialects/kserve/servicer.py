"""GRPCInferenceService: KServe's protocol by the servicers of the contract."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from functools import partial

from google.protobuf.duration_pb2 import Duration

from loraplex.operations.base import adapter_name
from loraplex.v1.adapters_pb2 import Adapter, LoadAdapterRequest
from loraplex.v1.models_pb2 import LoadModelRequest, Model, UnloadModelRequest
from loraplex_service.admission.places import SMALL_ANSWER_BYTES
from loraplex_service.call import Call, current_call, serving
from loraplex_service.call_errors import known_error
from loraplex_service.dialect_stubs import kserve_v2_pb2_grpc
from loraplex_service.dialect_stubs.kserve_v2_pb2 import (
    TYPE_BOOL,
    TYPE_FP32,
    TYPE_STRING,
    TYPE_UINT32,
    ModelConfig,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelInferRequest,
    ModelInferResponse,
    ModelInput,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelOutput,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelStreamInferResponse,
    ModelTransactionPolicy,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelLoadResponse,
    RepositoryModelUnloadRequest,
    RepositoryModelUnloadResponse,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
)
from loraplex_service.dialects.backend import READ_SECONDS, Backend, Context, tenant_of_names
from loraplex_service.dialects.fields import Draft
from loraplex_service.dialects.kserve.answers import Answers
from loraplex_service.dialects.kserve.requests import draft_of, named
from loraplex_service.dialects.kserve.tensors import FINAL, INPUTS, OUTPUTS, asked_of, check_kind
from loraplex_service.errors import (
    FailedPrecondition,
    FeatureUnsupported,
    InvalidRequest,
    LoraplexError,
    NotFound,
    Unavailable,
    to_status,
)
from loraplex_service.ports.wire import SMALL_BYTES

NAME = "loraplex"
AT_ONCE = 16  # requests of one stream: more wait for their turn
SLOT_BYTES = 256 << 10  # a larger request takes several slots: a stream holds no more than the largest request alone
EXTENSIONS = ("model_repository", "model_repository(unload_dependents)", "model_configuration")
_STATES = {
    Model.STATE_UNLOADED: "UNAVAILABLE",
    Model.STATE_LOADING: "LOADING",
    Model.STATE_ACTIVE: "READY",
    Model.STATE_UNLOADING: "UNLOADING",
    Model.STATE_FAILED: "UNAVAILABLE",
}
_ADAPTER_STATES = {
    Adapter.STATE_LOADING: "LOADING",
    Adapter.STATE_ACTIVE: "READY",
    Adapter.STATE_FAILED: "UNAVAILABLE",
    Adapter.STATE_DELETING: "UNLOADING",
}
_DATA_TYPES = {"BYTES": TYPE_STRING, "BOOL": TYPE_BOOL, "FP32": TYPE_FP32, "UINT32": TYPE_UINT32}

Results = asyncio.Queue[ModelStreamInferResponse | Exception | None]


class KServeServicer(kserve_v2_pb2_grpc.GRPCInferenceServiceServicer):
    """Every name of a model is the one field of the contract: a model, an adapter, a version, a route, a sum."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    # ---- the server and what it has ----------------------------------------------------------------------------------

    async def ServerLive(self, request: ServerLiveRequest, context: Context) -> ServerLiveResponse:  # noqa: N802
        return ServerLiveResponse(live=True)

    async def ServerReady(self, request: ServerReadyRequest, context: Context) -> ServerReadyResponse:  # noqa: N802
        return ServerReadyResponse(ready=self._backend.is_serving())

    async def ServerMetadata(  # noqa: N802
        self, request: ServerMetadataRequest, context: Context
    ) -> ServerMetadataResponse:
        return ServerMetadataResponse(name=NAME, version=self._backend.version, extensions=EXTENSIONS)

    async def ModelReady(self, request: ModelReadyRequest, context: Context) -> ModelReadyResponse:  # noqa: N802
        try:
            self._backend.target(named(request.name, request.version), "name")
        except (NotFound, FailedPrecondition, Unavailable):
            return ModelReadyResponse(ready=False)
        return ModelReadyResponse(ready=self._backend.is_serving())

    async def ModelMetadata(self, request: ModelMetadataRequest, context: Context) -> ModelMetadataResponse:  # noqa: N802
        target = self._backend.target(named(request.name, request.version), "name")
        return ModelMetadataResponse(
            name=request.name,
            versions=[] if target.adapter is None else [target.adapter.version_name.rpartition("@")[2]],
            platform=NAME,
            inputs=[
                ModelMetadataResponse.TensorMetadata(name=name, datatype=kind, shape=[1])
                for name, (kind, _) in INPUTS.items()
            ],
            outputs=[
                ModelMetadataResponse.TensorMetadata(name=name, datatype=kind, shape=[-1])
                for name, kind in OUTPUTS.items()
            ],
        )

    async def ModelConfig(self, request: ModelConfigRequest, context: Context) -> ModelConfigResponse:  # noqa: N802
        self._backend.target(named(request.name, request.version), "name")
        inputs = [
            ModelInput(name=name, data_type=_DATA_TYPES[kind], dims=[1], optional=is_optional)
            for name, (kind, is_optional) in INPUTS.items()
        ]
        outputs = [ModelOutput(name=name, data_type=_DATA_TYPES[kind], dims=[-1]) for name, kind in OUTPUTS.items()]
        config = ModelConfig(
            name=request.name,
            platform=NAME,
            backend=NAME,
            max_batch_size=0,
            input=inputs,
            output=outputs,
            model_transaction_policy=ModelTransactionPolicy(decoupled=True),
        )
        return ModelConfigResponse(config=config)

    # ---- generating --------------------------------------------------------------------------------------------------

    async def ModelInfer(self, request: ModelInferRequest, context: Context) -> ModelInferResponse:  # noqa: N802
        asked = asked_of(request)
        if asked.stream:
            raise InvalidRequest.at("stream", "is true: ask ModelStreamInfer for a stream, or leave it out")
        draft = await draft_of(request, asked, self._backend)
        return await self._whole(draft, Answers(request, asked), context)

    async def ModelStreamInfer(  # noqa: N802
        self, request_iterator: AsyncIterator[ModelInferRequest], context: Context
    ) -> AsyncGenerator[ModelStreamInferResponse, None]:
        results = Results(1)  # requests wait until their answers are read
        taking = asyncio.create_task(self._take(request_iterator, context, results))
        try:
            while (result := await results.get()) is not None:
                if isinstance(result, Exception):
                    raise result
                yield result
                results.task_done()  # it is written
        finally:
            taking.cancel()
            await asyncio.gather(taking, return_exceptions=True)

    async def _take(self, requests: AsyncIterator[ModelInferRequest], context: Context, results: Results) -> None:
        """Answer each request of a stream by itself. What is no request ends the stream."""
        slots, tasks, is_first = asyncio.Semaphore(AT_ONCE), set[asyncio.Task[None]](), True
        try:
            async for request in requests:
                taken = min(AT_ONCE, 1 + request.ByteSize() // SLOT_BYTES)
                for _ in range(taken):
                    await slots.acquire()
                call = current_call().item()
                task = asyncio.create_task(self._answer(request, call, is_first, context, results))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                task.add_done_callback(partial(_release, slots, taken))
                is_first = False
            await asyncio.gather(*tasks)
            await results.put(None)
        except Exception as error:
            await results.put(error)
        finally:
            running = [*tasks]
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _answer(
        self, request: ModelInferRequest, call: Call, is_first: bool, context: Context, results: Results
    ) -> None:
        """Answer one request of a stream, as if it had been sent alone. Its failure leaves the others alone."""
        with serving(call):
            try:
                if not is_first:  # the first is counted: it is the call
                    self._backend.tenants.get(call.tenant).count_request()
                async with aclosing(self._responses(request, context)) as responses:
                    async for response in responses:
                        await self._tell(response, call.tenant, results)
            except Exception as error:
                await results.put(_failed(request, known_error(error, call, "a request of ModelStreamInfer")))

    async def _tell(self, response: ModelInferResponse, tenant: str, results: Results) -> None:
        """Have a response written in its turn. Large ones count as unread until they are. Raises SlowConsumer."""
        told, size = ModelStreamInferResponse(infer_response=response), response.ByteSize()
        if size <= SMALL_ANSWER_BYTES:
            await results.put(told)
            return
        self._backend.unread.send(tenant, size)
        try:
            await results.put(told)
            await results.join()
        finally:
            self._backend.unread.sent(tenant, size)

    async def _responses(
        self, request: ModelInferRequest, context: Context
    ) -> AsyncGenerator[ModelInferResponse, None]:
        asked = asked_of(request)
        draft, answers = await draft_of(request, asked, self._backend), Answers(request, asked)
        if not asked.stream:
            yield await self._whole(draft, answers, context)
            if asked.says_the_end:
                yield answers.end()
            return
        async with aclosing(self._backend.stream(draft, context)) as events:
            async for event in events:
                response = answers.part(event)
                if response is not None:
                    yield response

    async def _whole(self, draft: Draft, answers: Answers, context: Context) -> ModelInferResponse:
        response = await self._backend.whole(draft, context)
        if response.ByteSize() > SMALL_BYTES:  # in a thread: the loop has others to serve
            answer = await asyncio.to_thread(answers.whole, response)
            self._backend.check_answer(answer.ByteSize())
            return answer
        return answers.whole(response)

    # ---- the repository ----------------------------------------------------------------------------------------------

    async def RepositoryIndex(  # noqa: N802
        self, request: RepositoryIndexRequest, context: Context
    ) -> RepositoryIndexResponse:
        index = RepositoryIndexResponse()
        for model in self._backend.list_models():
            if not request.ready or model.state == Model.STATE_ACTIVE:
                found = RepositoryIndexResponse.ModelIndex(
                    name=model.name, state=_STATES[model.state], reason=model.error.message
                )
                index.models.append(found)
        async for adapter in self._backend.list_adapters(context, versions=True):
            if not request.ready or adapter.state == Adapter.STATE_ACTIVE:
                found = RepositoryIndexResponse.ModelIndex(
                    name=adapter.name,
                    version=adapter.version.rpartition("@")[2],
                    state=_ADAPTER_STATES[adapter.state],
                    reason=adapter.error.message,
                )
                index.models.append(found)
        return index

    async def RepositoryModelLoad(  # noqa: N802
        self, request: RepositoryModelLoadRequest, context: Context
    ) -> RepositoryModelLoadResponse:
        _refuse_others(request.parameters, ("source", "base_model"))
        for name, value in request.parameters.items():
            check_kind(value, "string_param", name)
        given = {name: value.string_param for name, value in request.parameters.items()}
        if "source" in given:
            draft = Draft(names=_LOADED)
            await self._backend.register(
                draft, request.model_name, given["source"], given.get("base_model", ""), context
            )
        elif (model := self._model(request.model_name)) is not None:
            wait = Duration(seconds=READ_SECONDS)
            loaded = await self._backend.models.LoadModel(LoadModelRequest(name=model, wait=wait), context)
            if loaded.state != Model.STATE_ACTIVE:
                problem = f"{model} is not loaded after {READ_SECONDS} s: {loaded.error.message}"
                raise Unavailable("MODEL_LOADING", problem)
        else:
            name = adapter_name(request.model_name, tenant_of_names(context))
            target = self._backend.target(name, "model_name")
            if target.adapter is None:
                raise InvalidRequest.at("model_name", "names no model or adapter; to register one, give source")
            wait = Duration(seconds=READ_SECONDS)
            await self._backend.adapters.LoadAdapter(
                LoadAdapterRequest(name=target.adapter.version_name, wait=wait), context
            )
        return RepositoryModelLoadResponse()

    async def RepositoryModelUnload(  # noqa: N802
        self, request: RepositoryModelUnloadRequest, context: Context
    ) -> RepositoryModelUnloadResponse:
        _refuse_others(request.parameters, ("unload_dependents",))  # there are none: nothing depends on others here
        if (model := self._model(request.model_name)) is not None:
            await self._backend.models.UnloadModel(UnloadModelRequest(name=model), context)
        else:
            await self._backend.delete(Draft(names=_UNLOADED), request.model_name, context)
        return RepositoryModelUnloadResponse()

    def _model(self, name: str) -> str | None:
        """The full name of a model that is hosted, loaded or not; None: it is none."""
        bare = name.removeprefix("models/")
        return None if self._backend.host.find(bare) is None else f"models/{bare}"


_LOADED = [
    ("adapter_id", "model_name"),
    ("parent", "model_name"),
    ("adapter.source", "parameters[source]"),
    ("adapter.base_model", "parameters[base_model]"),
]
_UNLOADED = [("name", "model_name")]


def _release(slots: asyncio.Semaphore, taken: int, _: object) -> None:
    for _ in range(taken):
        slots.release()


def _refuse_others(given: Iterable[str], known: tuple[str, ...]) -> None:
    for name in given:
        if name not in known:
            raise FeatureUnsupported(f"parameters[{name[:100]}]", f"is not taken here; there are {', '.join(known)}")


def _failed(request: ModelInferRequest, error: LoraplexError) -> ModelStreamInferResponse:
    """The response that tells of a request of a stream that failed."""
    response = ModelInferResponse(model_name=request.model_name, id=request.id)
    response.parameters["status"].string_param = error.code.name
    response.parameters["reason"].string_param = error.reason
    response.parameters[FINAL].bool_param = True
    message = to_status(error, current_call().request_id).message
    return ModelStreamInferResponse(error_message=f"[{error.reason}] {message}", infer_response=response)
