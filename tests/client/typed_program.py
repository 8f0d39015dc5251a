"""Uses both kinds of client as a program with types does. Type checkers read it; nothing runs it."""

import asyncio
import datetime
from typing import assert_type

from google.protobuf.empty_pb2 import Empty

from loraplex import (
    AdminClient,
    AsyncAdminClient,
    AsyncClient,
    AsyncGenerateStream,
    AsyncStream,
    Client,
    GenerateOptions,
    GenerateStream,
    LoraplexError,
    Stream,
    generate_spec,
    raise_for_error,
)
from loraplex.v1.adapters_pb2 import Adapter, WatchAdaptersResponse
from loraplex.v1.generation_pb2 import ON_COLD_FAIL, GenerateSpec
from loraplex.v1.inference_pb2 import (
    FINISH_REASON_MAX_TOKENS,
    BatchGenerateResponse,
    GenerateResponse,
    StreamGenerateResponse,
)
from loraplex.v1.models_pb2 import Model
from loraplex.v1.routes_pb2 import Route, RouteTarget
from loraplex.v1.tokenizer_pb2 import TokenizeResponse


def blocking() -> None:
    with Client("localhost:50051", token=lambda: "secret", timeout=20) as client:
        answer = client.generate(
            "demo",
            "Once",
            temperature=0,
            stop=["."],
            logit_bias={7: -1.5},
            json_schema={"type": "object"},
            on_cold=ON_COLD_FAIL,
            time_limit=datetime.timedelta(seconds=2),
            labels={"team": "x"},
            timeout=None,
        )
        assert_type(answer, GenerateResponse)
        assert_type([output.text for output in answer.outputs], list[str])
        cut = [output for output in answer.outputs if output.finished.reason == FINISH_REASON_MAX_TOKENS]
        print(len(cut))

        options = GenerateOptions(max_tokens=8, seed=None)
        with client.stream_generate("demo", [{"role": "user", "content": "Hello"}], **options) as stream:
            assert_type(stream, GenerateStream)
            assert_type(next(stream), StreamGenerateResponse)
            for text in stream.text():
                assert_type(text, str)
        spec = generate_spec("demo", [1, 2, 3], n=2)
        assert_type(spec, GenerateSpec)
        assert_type(client.batch_generate([spec]), Stream[BatchGenerateResponse])
        assert_type(client.tokenize("demo", "Once", add_special_tokens=False), TokenizeResponse)
        assert_type(client.list_models(), list[Model])
        assert_type(client.is_serving("models/demo"), bool)


def administration() -> None:
    with AdminClient("localhost:50052") as admin:
        adapter = admin.upload_adapter("legal", base_model="demo", directory=".", residency="host", wait=10)
        assert_type(adapter, Adapter)
        raise_for_error(adapter)
        for message in admin.watch_adapters(tenant="acme"):
            assert_type(message, WatchAdaptersResponse)
            break
        admin.update_route(Route(name="tenants/acme/routes/main", targets=[RouteTarget(model="demo")]))
        assert_type(admin.delete_route("main", tenant="acme", wait_for_ready=True), Empty)


async def awaiting() -> None:
    async with AsyncClient("localhost:50051", tenant="acme") as client:
        await client.wait_until_serving(timeout=10)
        try:
            answer = await client.generate(spec=generate_spec("demo", "Once"), routing_key="k", timeout=1.5)
            assert_type(answer, GenerateResponse)
        except LoraplexError as error:
            assert_type(error.retry_after, float | None)
        async with client.stream_generate("demo", "Once", max_tokens=8) as stream:
            assert_type(stream, AsyncGenerateStream)
            assert_type(await anext(stream), StreamGenerateResponse)
            async for text in stream.text():
                assert_type(text, str)
        assert_type(await stream.collect(), GenerateResponse)
        assert_type(client.batch_generate([]), AsyncStream[BatchGenerateResponse])
        async for result in client.batch_generate([generate_spec("demo", "Once")], max_concurrency=1):
            assert_type(result, BatchGenerateResponse)
    async with AsyncAdminClient("localhost:50052") as admin:
        assert_type(await admin.list_adapters(tenant="acme", include_versions=True), list[Adapter])
        assert_type(await admin.load_model("demo", wait=10), Model)


if __name__ == "__main__":
    blocking()
    administration()
    asyncio.run(awaiting())
