"""Adapters that come and go at run time, by the two calls that vLLM has for it, on the admin port."""

from collections.abc import Mapping
from typing import Any

from google.protobuf.duration_pb2 import Duration

from loraplex import from_status
from loraplex.channel import CallOptions
from loraplex.operations.base import adapter_name, model_name, tenant_name
from loraplex.v1.adapters_pb2 import Adapter, CreateAdapterRequest, DeleteAdapterRequest
from loraplex_service.http.failures import Refusal
from loraplex_service.http.parameters import (
    BOOLEAN,
    STRING,
    Draft,
    Parameter,
    Table,
    flag,
    refused,
    scalar,
    text,
    wrong,
)
from loraplex_service.http.service import TENANT, ServiceClient

READ_SECONDS = 60  # for the files of an adapter to be read
_ADAPTERS = "/adapters/"
_REQUIRED = (
    ("adapter_id", "lora_name"),
    ("parent", "lora_name"),
    ("adapter.source", "lora_path"),
    ("adapter.base_model", "base_model_name"),
)


def _put_new_name(draft: Draft, value: Any) -> None:
    """An id, or the full name of an adapter, tenants/{tenant}/adapters/{adapter}."""
    parent, is_full, adapter_id = text(value).rpartition(_ADAPTERS)
    draft.message.adapter_id = adapter_id
    if is_full:
        draft.message.parent = parent


def _put_name(draft: Draft, value: Any) -> None:
    draft.message.name = text(value)


def _put_base(draft: Draft, value: Any) -> None:
    draft.message.adapter.base_model = model_name(text(value))


def _put_in_place(draft: Draft, value: Any) -> None:
    """Both are the same here: a new version is read beside the old one, and the name moves when it is there."""
    flag(value)


LOAD = Table(
    "/v1/load_lora_adapter",
    lambda: Draft(CreateAdapterRequest(), paths=[*_REQUIRED]),
    (
        Parameter("lora_name", "adapter_id", _put_new_name, "an id, or tenants/{tenant}/adapters/{id}", schema=STRING),
        scalar("lora_path", "adapter.source", "a directory under `adapter_roots`, or s3://… or hf://…"),
        Parameter(
            "base_model_name", "adapter.base_model", _put_base, "where several models are served: which", schema=STRING
        ),
        Parameter(
            "load_inplace",
            "",
            _put_in_place,
            "taken: what the name means moves once the new version is there",
            schema=BOOLEAN,
        ),
        refused("is_3d_lora_weight", "the files say how their tensors are laid out", False),
    ),
    does="Registers an adapter, where `http_admin` allows it",
    needs=("lora_name", "lora_path"),
)

UNLOAD = Table(
    "/v1/unload_lora_adapter",
    lambda: Draft(DeleteAdapterRequest(), paths=[("name", "lora_name")]),
    (
        Parameter(
            "lora_name", "name", _put_name, "an id, tenants/{tenant}/adapters/{id}, or a version of it", schema=STRING
        ),
        refused("lora_int_id", "adapters have names"),
    ),
    does="Deletes an adapter, where `http_admin` allows it",
    needs=("lora_name",),
)


def _tenant(call: CallOptions) -> str:
    """The tenant whose adapters bare names mean: that of the header, else the shared one, as on the command line."""
    metadata: Mapping[str, str] = call.get("metadata") or {}
    return metadata.get(TENANT, "shared")


async def load(admin: ServiceClient, client: ServiceClient, draft: Draft, call: CallOptions) -> dict[str, Any]:
    """Register a version, and return what it is once it can be used. Raises Refusal, LoraplexError.

    `client`: of the data port, which says what models there are.
    """
    request: CreateAdapterRequest = draft.message
    request.parent = request.parent or tenant_name(_tenant(call))
    request.wait.CopyFrom(Duration(seconds=READ_SECONDS))
    if not request.adapter.base_model:
        request.adapter.base_model = await _only_model(client, call)
    adapter = await admin.ask("AdapterService/CreateAdapter", request, Adapter, call)
    if adapter.state == Adapter.STATE_FAILED:
        raise from_status(adapter.error)
    if adapter.state != Adapter.STATE_ACTIVE:
        problem = f"lora_path: is not read after {READ_SECONDS} s; ask again, or wait until /v1/models lists it"
        raise Refusal(503, problem, param="lora_path", code="adapter_loading", retry_after=1.0)
    return {"name": adapter.name, "version": adapter.version, "base_model": adapter.base_model, "rank": adapter.rank}


async def _only_model(client: ServiceClient, call: CallOptions) -> str:
    names = [model.name for model in await client.list_models(**call)]
    if len(names) != 1:
        raise wrong("base_model_name", f"several models are served; name one of {', '.join(names)}")
    return names[0]


async def unload(admin: ServiceClient, draft: Draft, call: CallOptions) -> dict[str, Any]:
    """Delete an adapter, and return what it was: new requests are refused, and running ones end in peace."""
    draft.message.name = adapter_name(draft.message.name, _tenant(call)) if draft.message.name else ""
    adapter = await admin.ask("AdapterService/DeleteAdapter", draft.message, Adapter, call)
    return {"name": adapter.name}
