"""What the `model` of a request may be: models, adapters and routes, as OpenAI lists models, and Anthropic."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from loraplex import AsyncClient
from loraplex.channel import CallOptions
from loraplex.v1.adapters_pb2 import Adapter
from loraplex.v1.models_pb2 import Model
from loraplex.v1.routes_pb2 import ResolvedTarget
from loraplex_service.http.parameters import wrong

MOST_MODELS = 1000  # of a page, where a size is asked for
OWNER = "loraplex"  # of what belongs to no tenant


async def listed(client: AsyncClient, call: CallOptions) -> list[dict[str, Any]]:
    """All that is ready and that the caller may use, by the names of the contract."""
    models, adapters, routes = await asyncio.gather(
        client.list_models(**call), client.list_adapters(**call), client.list_routes(**call)
    )
    limits = {model.name: model.limits.max_context_tokens for model in models}
    return [
        *(
            _card(model.name, model.load_time, max_model_len=limits[model.name] or None)
            for model in models
            if model.state == Model.STATE_ACTIVE
        ),
        *(
            _card(adapter.name, adapter.create_time, adapter.base_model, limits.get(adapter.base_model) or None)
            for adapter in adapters
            if adapter.state == Adapter.STATE_ACTIVE
        ),
        *(_card(route.name, route.create_time) for route in routes),
    ]


def page(models: Sequence[Mapping[str, Any]], asked: Mapping[str, str]) -> dict[str, Any]:
    """A page of the list, as clients of both APIs read it. Without a `limit` it has all, unlike Anthropic's.

    Raises Refusal for what is no place in the list.
    """
    ids = [model["id"] for model in models]
    first = _place(ids, asked, "after_id") + 1 if "after_id" in asked else 0
    end = _place(ids, asked, "before_id") if "before_id" in asked else len(ids)
    within = range(first, end)
    limit = _limit(asked["limit"]) if "limit" in asked else len(ids)
    shown = within[-limit:] if "before_id" in asked else within[:limit]
    data = [models[place] for place in shown]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
    return {"object": "list", "data": data, "has_more": len(shown) < len(within), **ends}


def _limit(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MOST_MODELS):
        raise wrong("limit", f"must be a number from 1 to {MOST_MODELS}")
    return int(text)


def _place(ids: Sequence[str], asked: Mapping[str, str], name: str) -> int:
    if asked[name] not in ids:
        raise wrong(name, f"there is no {asked[name][:200]!r} in the list")
    return ids.index(asked[name])


async def retrieved(client: AsyncClient, name: str, call: CallOptions) -> dict[str, Any]:
    """What a name leads to now: any that the `model` of a request may be. Raises NotFound."""
    target = (await client.resolve_target(name, **call)).target
    model = await client.get_model(target.model, **call)
    created, parent = await _creation(client, target, model, call), None
    if target.adapter_version or target.route:
        parent = target.model
    card = _card(name, created, parent, model.limits.max_context_tokens or None)
    return {**card, "root": target.adapter_version or target.model}


async def _creation(client: AsyncClient, target: ResolvedTarget, model: Model, call: CallOptions) -> Timestamp:
    """When there was first what a name leads to; of a weighted sum, when its model was loaded."""
    if target.route:
        return (await client.get_route(target.route, **call)).create_time
    if target.adapter_version and "*" not in target.adapter_version:
        return (await client.get_adapter(target.adapter_version.partition("@")[0], **call)).create_time
    return model.load_time


def _card(name: str, created: Timestamp, parent: str | None = None, max_model_len: int | None = None) -> dict[str, Any]:
    """`parent`: the model that an adapter belongs to."""
    owner = name.split("/")[1] if name.startswith("tenants/") else OWNER
    return {
        "id": name,
        "object": "model",
        "created": created.seconds,
        "owned_by": owner,
        "root": name,
        "parent": parent,
        "max_model_len": max_model_len,
        "type": "model",
        "display_name": name,
        "created_at": created.ToJsonString(),
    }
