"""Operations against the contract itself."""

from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pool

from loraplex import AdminClient, AsyncAdminClient, AsyncClient, Client
from loraplex.operations import adapters, inference, models, pooled, routes, server
from loraplex.operations.base import Listing, Operation, Upload, adapter_name, model_name, route_name, tenant_name
from loraplex.prompts import Message, PromptLike
from loraplex.v1 import adapters_pb2, pooling_pb2, routes_pb2

SERVICES = {
    "inference": "InferenceService",
    "pooling": "PoolingService",
    "tokenizer": "TokenizerService",
    "models": "ModelService",
    "adapters": "AdapterService",
    "routes": "RouteService",
    "server": "ServerService",
}
OPERATIONS: list[Operation[Any]] = [
    inference.generate("demo", "Once"),
    inference.stream_generate("demo", "Once"),
    inference.batch_generate([]),
    inference.score("demo", "Once", [" upon", [1, 2]]),
    inference.cancel_generation(["r1"]),
    inference.tokenize("demo", "Once"),
    inference.detokenize("demo", [1]),
    pooled.embed("demo", ["Once"]),
    pooled.classify("demo", ["Once"]),
    pooled.rerank("demo", "What?", ["Once"]),
    models.get_model("demo"),
    models.list_models().page(""),
    models.load_model("demo"),
    models.unload_model("demo"),
    models.watch_models(),
    adapters.get_adapter("a"),
    adapters.list_adapters().page(""),
    adapters.create_adapter("a", base_model="demo", source="/a"),
    adapters.update_adapter("a", pinned=True),
    adapters.delete_adapter("a"),
    adapters.load_adapter("a"),
    adapters.unload_adapter("a"),
    adapters.watch_adapters(),
    routes.get_route("r"),
    routes.list_routes().page(""),
    routes.update_route(routes_pb2.Route(name="tenants/t/routes/r")),
    routes.delete_route("r"),
    routes.resolve_target("demo"),
    server.get_server_info(),
    server.watch_load(),
    server.watch_usage(),
]


def method_of(path: str) -> Any:
    _, service, method = path.split("/")
    found: Any = descriptor_pool.Default().FindServiceByName(service)
    return found.methods_by_name[method]


@pytest.fixture
def upload(tmp_path: Path) -> Upload[adapters_pb2.Adapter]:
    for name in adapters.FILES:
        (tmp_path / name).write_bytes(b"12345")
    return adapters.upload_adapter("a", base_model="demo", directory=tmp_path)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.method)
def test_request_and_response_are_those_of_the_method(operation: Operation[Any]) -> None:
    method = method_of(operation.method)
    assert operation.request.DESCRIPTOR is method.input_type
    assert operation.response.DESCRIPTOR is method.output_type


def test_every_method_has_an_operation(upload: Upload[adapters_pb2.Adapter]) -> None:
    contract = set()
    for file, service in SERVICES.items():
        found: Any = descriptor_pool.Default().FindFileByName(f"loraplex/v1/{file}.proto")
        assert list(found.services_by_name) == [service]
        contract |= {f"/loraplex.v1.{service}/{name}" for name in found.services_by_name[service].methods_by_name}
    assert {operation.method for operation in OPERATIONS} | {upload.method} == contract


@pytest.mark.parametrize(("asynchronous", "blocking"), [(AsyncClient, Client), (AsyncAdminClient, AdminClient)])
def test_both_kinds_of_client_have_the_same_methods(asynchronous: type, blocking: type) -> None:
    def public(kind: type) -> dict[str, str | None]:
        return {name: vars(kind)[name].__doc__ for name in vars(kind) if not name.startswith("_")}

    assert public(asynchronous) == public(blocking)


def test_an_upload_is_a_header_then_each_file_in_chunks(upload: Upload[adapters_pb2.Adapter]) -> None:
    method = method_of(upload.method)
    requests: list[Any] = list(upload.requests)
    assert all(request.DESCRIPTOR is method.input_type for request in requests)
    assert upload.response.DESCRIPTOR is method.output_type
    assert [request.WhichOneof("payload") for request in requests] == ["header", "file", "chunk", "file", "chunk"]
    assert [request.file.size_bytes for request in requests[1::2]] == [5, 5]


def test_an_upload_of_missing_files_fails_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        adapters.upload_adapter("a", base_model="demo", directory=tmp_path)


@pytest.mark.parametrize("own", ["größe", "two\nlines", ""])
def test_what_metadata_cannot_hold_is_in_the_spec_alone(own: str) -> None:
    operation = inference.generate("models/demo", "Once", client_request_id=own)
    request: Any = operation.request
    assert (request.spec.client_request_id, operation.call.get("metadata", {})) == (own, {})


@pytest.mark.parametrize(
    "operation",
    [operation for operation in OPERATIONS if "request_id" in operation.request.DESCRIPTOR.fields_by_name],
    ids=lambda operation: operation.method,
)
def test_mutations_carry_an_id_so_that_retries_are_harmless(operation: Any) -> None:
    assert operation.request.request_id


def test_list_filters_reach_every_page() -> None:
    listing: Listing[adapters_pb2.Adapter] = adapters.list_adapters(tenant="acme", base_model="demo", timeout=3)
    operation = listing.page("next")
    assert operation.request == adapters_pb2.ListAdaptersRequest(
        parent="tenants/acme", base_model="models/demo", page_token="next"
    )
    assert operation.call == {"timeout": 3}


def test_moving_the_alias_is_an_update_of_version_alone() -> None:
    request: Any = adapters.update_adapter("legal", tenant="acme", version="legal@1a2b3c4d5e6f").request
    assert request.adapter.version == "tenants/acme/adapters/legal@1a2b3c4d5e6f"
    assert list(request.update_mask.paths) == ["version"]


def test_labels_can_be_cleared() -> None:
    request: Any = adapters.update_adapter("legal", labels={}).request
    assert list(request.update_mask.paths) == ["labels"]


def test_an_update_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to change"):
        adapters.update_adapter("legal")


def test_residency_by_name() -> None:
    request: Any = adapters.load_adapter("legal", residency="host").request
    assert request.residency == adapters_pb2.ADAPTER_RESIDENCY_HOST


def test_names_in_full_or_as_ids() -> None:
    assert model_name("demo") == model_name("models/demo") == "models/demo"
    assert tenant_name("acme") == tenant_name("tenants/acme") == "tenants/acme"
    assert adapter_name("legal", "acme") == adapter_name("tenants/acme/adapters/legal") == "tenants/acme/adapters/legal"
    assert route_name("main") == "tenants/shared/routes/main"


def test_the_label_of_a_request_is_also_metadata() -> None:
    operation = inference.generate("models/demo", "Once", client_request_id="mine", metadata={"traceparent": "t"})
    assert operation.call["metadata"] == {"x-request-id": "mine", "traceparent": "t"}


def test_prompts_to_embed_are_of_all_kinds_and_have_the_options_of_prompts() -> None:
    chat: list[Message] = [{"role": "user", "content": "hi"}]
    prompts: list[PromptLike] = ["a text", [1, 2], chat]
    options: dict[str, Any] = {"truncate_to_tokens": 5, "salt": "s", "on_cold": "fail", "labels": {"a": "b"}}
    request: Any = pooled.embed("demo", prompts, pooling="mean", dimensions=4, normalize=False, **options).request
    assert [prompt.WhichOneof("content") for prompt in request.prompts] == ["text", "token_ids", "chat"]
    assert {prompt.truncate_to_tokens for prompt in request.prompts} == {5}
    assert (request.pooling, request.dimensions, request.normalize) == (pooling_pb2.POOLING_MEAN, 4, False)
    assert (request.options.cache.salt, request.options.labels["a"]) == ("s", "b")
    assert request.options.adapter_policy.on_cold


def test_a_string_is_one_text_to_embed() -> None:
    request: Any = pooled.embed("demo", "Once").request
    assert [prompt.text for prompt in request.prompts] == ["Once"]
    assert not request.HasField("normalize")
