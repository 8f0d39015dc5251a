"""The calls of Tinker's REST API: sampling, and what the `tinker` package asks before it samples."""

import asyncio
from collections.abc import Mapping
from functools import partial
from hashlib import sha256
from typing import Any, TypeAlias
from uuid import uuid4

import msgspec

from loraplex import AsyncClient, LoraplexError
from loraplex.channel import CallOptions
from loraplex.v1.inference_pb2 import GenerateRequest, GenerateResponse
from loraplex.v1.models_pb2 import Model
from loraplex.v1.routes_pb2 import ResolveTargetResponse
from loraplex_service.http.exchange import Exchange
from loraplex_service.http.failures import failed
from loraplex_service.http.parameters import Draft, text, wrong
from loraplex_service.http.service import API_KEY, TENANT, Clients, ServiceClient, call_options
from loraplex_service.http.tinker.futures import Futures, Outcome, Owner
from loraplex_service.http.tinker.messages import MEDIA_TYPE, sample_response
from loraplex_service.http.tinker.table import SCHEME, model_of, session_id

API = "/api/v1/"
KEY_PREFIX = "tml-"  # without which Tinker's package takes no key: it stands in front of the server's own
WAIT_SECONDS = 20.0  # for a sample, before its caller is told to ask again
AT_ONCE = 256  # samples of one client of Tinker's
AGAIN = (429, 503)  # a request that failed so may be made again, which its caller does where a sample is gone

Json: TypeAlias = dict[str, Any]

# What is answered alike to all, by the paths behind API.
TOLD: Mapping[str, tuple[str, Json]] = {
    "healthz": ("GET", {"status": "ok"}),
    "client/config": ("POST", {"sample_max_concurrent_requests": AT_ONCE}),
    "client/dynamic_config": ("POST", {"sample_cancel_enabled": True}),
    "session_heartbeat": ("POST", {"type": "session_heartbeat"}),
    "telemetry": ("POST", {"status": "accepted"}),  # and thrown away
}
# Calls of trainers, which compute gradients.
REFUSED = (
    *("create_model", "unload_model", "get_info", "copy_weights", "weights_info", "create_custom_loss"),
    *("forward", "forward_backward", "optim_step", "load_weights", "save_weights"),
    *("save_weights_for_sampler", "save_weights_external"),
)
WHY_REFUSED = (
    "nothing is trained here: train elsewhere, publish the adapter (UploadAdapter, or POST /v1/load_lora_adapter), and "
    f"sample from {SCHEME} and its name"
)


def begin(exchange: Exchange) -> None:
    """Take the key as Tinker's package sends it."""
    if API_KEY in exchange.headers:
        exchange.headers[API_KEY] = exchange.headers[API_KEY].removeprefix(KEY_PREFIX)


def owner(exchange: Exchange) -> Owner:
    """Whose a sample is. A token is one payer however it is sent; a caller without any is its tenant."""
    headers = exchange.headers
    token = headers.get("authorization", "").partition(" ")[2].strip() or headers.get(API_KEY, "")
    tenant = headers.get(TENANT, "")
    return Owner(sha256(f"{token}\0{'' if token else tenant}".encode()).digest(), tenant)


# ---- sessions --------------------------------------------------------------------------------------------------------


def new_session() -> Json:
    """A session, of which nothing is kept."""
    return {"type": "create_session", "session_id": f"session-{uuid4().hex}"}


async def capabilities(client: AsyncClient, call: CallOptions) -> Json:
    """The models that samples can be drawn from."""
    models = [model for model in await client.list_models(**call) if model.state == Model.STATE_ACTIVE]
    return {"supported_models": [_supported(model) for model in models]}


def _supported(model: Model) -> Json:
    name, limit = model.name.removeprefix("models/"), model.limits.max_context_tokens
    return {"model_name": name, "max_context_length": limit or None, "trainable": False, "sampleable": True}


async def create_sampling_session(client: ServiceClient, draft: Draft, call: CallOptions) -> Json:
    """A sampling session of the adapter version that the name means now: it stays with that version."""
    found = await client.ask("RouteService/ResolveTarget", draft.message, ResolveTargetResponse, call)
    model = found.target.adapter_version or found.target.model
    return {"type": "create_sampling_session", "sampling_session_id": session_id(model)}


async def sampler(client: AsyncClient, name: str, call: CallOptions) -> Json:
    """What a sampling session samples from."""
    try:
        model = model_of(name)
    except ValueError as error:
        raise wrong("sampler_id", str(error)) from error
    target = (await client.resolve_target(model, **call)).target
    path = f"{SCHEME}{target.adapter_version}" if target.adapter_version else None
    return {"sampler_id": name, "base_model": target.model.removeprefix("models/"), "model_path": path}


# ---- samples ---------------------------------------------------------------------------------------------------------


async def begin_sample(
    exchange: Exchange, client: ServiceClient, clients: Clients, futures: Futures, draft: Draft
) -> Json:
    """Begin a sample, and say by which id it is fetched. Raises Refusal where there is no room, LoraplexError."""
    call = call_options(exchange)
    await client.check_role(call)  # nothing is kept for who may not sample
    number = futures.begin(owner(exchange), draft.message.ByteSize(), partial(_sample, clients, draft, call))
    count = draft.message.sampling.n or 1
    return {"request_id": number, "sample_sequence_ids": [f"{number}-{index}" for index in range(count)]}


async def _sample(clients: Clients, draft: Draft, call: CallOptions) -> Outcome:
    request = GenerateRequest(spec=draft.message)
    try:
        with clients.lease() as client:
            response = await client.ask("InferenceService/Generate", request, GenerateResponse, call)
    except LoraplexError as error:
        return _failed(error, draft)
    given = draft.given
    body = await asyncio.to_thread(
        sample_response,
        response,
        given.get("topk_sample_logprobs") or 0,
        bool(given.get("prompt_logprobs")),
        given.get("topk_prompt_logprobs") or 0,
        given.get("prompt_logprobs_last_n"),
    )
    return Outcome(200, MEDIA_TYPE, body)


def _failed(error: LoraplexError, draft: Draft) -> Outcome:
    failure = failed(error, draft.named)
    told = failure.body["error"]
    content = {"error": told["message"], "category": "user" if failure.status < 500 else "server", "details": told}
    return Outcome(410 if failure.status in AGAIN else 200, "application/json", msgspec.json.encode(content))


async def fetch(exchange: Exchange, futures: Futures, number: str) -> None:
    """Answer with a sample, or that it must be asked for again. Raises Refusal for one that is gone."""
    outcome = await futures.fetch(number, owner(exchange), WAIT_SECONDS)
    if outcome is None:
        await exchange.answer({"type": "try_again", "request_id": number, "queue_state": "active"})
    else:
        await exchange.page(outcome.body, outcome.kind, outcome.status)


def request_id(body: Json) -> str:
    """The id of the sample that a body names. Raises Refusal."""
    try:
        return text(body.get("request_id"))
    except TypeError as error:
        raise wrong("request_id", str(error)) from error
