"""What there is over HTTP, as an OpenAPI document and as a page: both are made of the tables that read the bodies."""

import html
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from loraplex_service.http import trainers
from loraplex_service.http.dialects import TABLES
from loraplex_service.http.failures import anthropic_error, openai_error
from loraplex_service.http.parameters import INTEGERS, REALS, Parameter, Table, place
from loraplex_service.http.service import FORWARDED, TIMEOUT
from loraplex_service.http.tinker.api import API, REFUSED, WHY_REFUSED
from loraplex_service.validation.limits import LIMITS, Entries, Limit, Range, Text

Json = dict[str, Any]
READS = {
    "/v1/models": "What the `model` of a request may be: models, adapters and routes that are ready",
    "/v1/models/{name}": "What one name leads to now",
    "/health": "Whether new requests are admitted: 200, else 503",
    "/version": "The version of the server",
    "/openapi.json": "This document",
    "/docs": "This document as a page",
    "/get_world_size": "1, whatever the model is computed by",
    "/is_paused": "false: nothing is ever paused",
    "/server_info": "Refused: there are no settings of vLLM",
    f"{API}healthz": "Whether the server answers",
    f"{API}get_server_capabilities": "The models that samples can be drawn from",
    f"{API}samplers/{{name}}": "What a sampling session samples from",
}
TINKER = {  # what has no table: bodies of which nothing counts, or an id
    f"{API}create_session": "A session, of which nothing is kept",
    f"{API}sessions/{{name}}": "Has nothing to do: of a session nothing is kept",
    f"{API}session_heartbeat": "Has nothing to do: of a session nothing is kept",
    f"{API}telemetry": "Taken, and thrown away",
    f"{API}client/config": "Settings of the client",
    f"{API}client/dynamic_config": "Settings of the client",
    f"{API}retrieve_future": "The sample of a `request_id`, once it is there",
    f"{API}cancel_future": "Forgets the sample of a `request_id`",
    **{f"{API}{path}": f"Refused: {WHY_REFUSED}" for path in REFUSED},
}
CREDENTIALS: Json = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
ERROR: Json = {
    "type": "object",
    "properties": {name: {"type": ["string", "null"]} for name in ("message", "type", "param", "code", "reason")},
}
ERRORS: Mapping[Any, Json] = {
    openai_error: {"type": "object", "properties": {"error": ERROR}},
    anthropic_error: {"type": "object", "properties": {"type": {"const": "error"}, "error": ERROR}},
}


def document(version: str) -> Json:
    """The OpenAPI document."""
    paths: Json = {table.path: {"post": _call(table)} for table in TABLES}
    for path, summary in READS.items():
        answers = {"200": {"description": "as the summary says"}}
        paths[path] = {"get": {"operationId": _operation("get", path), "summary": summary, "responses": answers}}
    for path, why in {**trainers.NEEDLESS, **trainers.REFUSED, **TINKER}.items():
        answers = {"400" if path in trainers.REFUSED else "200": {"description": why}}
        summary = "Refused" if path in trainers.REFUSED else why
        paths[path] = {"post": {"operationId": _operation("post", path), "summary": summary, "responses": answers}}
    paths["/health"]["get"]["responses"]["503"] = {"description": "new requests are not admitted"}
    for path in (path for path in paths if path.endswith("{name}")):
        named = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        next(iter(paths[path].values()))["parameters"] = [named]
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Loraplex",
            "version": version,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"securitySchemes": CREDENTIALS},
        "security": [{}, {"bearer": []}, {"key": []}],
    }


def _call(table: Table) -> Json:
    answers: Json = {"application/json": {}}
    if any(parameter.name == "stream" for parameter in table.parameters):
        answers["text/event-stream"] = {}
    schema = {**body_schema(table), "required": list(table.needs)}
    return {
        "operationId": _operation("post", table.path),
        "summary": table.does,
        "parameters": [_header(name) for name in (*FORWARDED[1:], TIMEOUT)],
        "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
        "responses": {
            "200": {"description": "the answer", "content": answers},
            "default": {
                "description": "what went wrong",
                "content": {"application/json": {"schema": ERRORS[table.told]}},
            },
        },
    }


def _operation(method: str, path: str) -> str:
    """The name of a call, such as post_v1_chat_completions."""
    return "_".join([method, *re.findall(r"[a-z0-9_]+", path)])


def _header(name: str) -> Json:
    return {"name": name, "in": "header", "schema": {"type": "string"}}


# ---- bodies ----------------------------------------------------------------------------------------------------------


def body_schema(table: Table) -> Json:
    """The JSON Schema of an endpoint's bodies. `null` is the same as nothing."""
    properties = {parameter.name: _property(table, parameter) for parameter in table.parameters}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _property(table: Table, parameter: Parameter) -> Json:
    becomes = f"becomes `{parameter.becomes}`" if parameter.becomes else ""
    description = "; ".join(part for part in (parameter.note, becomes) if part)
    schema = _of_field(table, parameter) if parameter.schema is None else parameter.schema
    return {**_or_null(schema), **({"description": description} if description else {})}


def _or_null(schema: Mapping[str, Any]) -> Json:
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    if isinstance(schema.get("type"), str):
        return {**schema, "type": [schema["type"], "null"]}
    return {"anyOf": [*schema["anyOf"], {"type": "null"}]} if "anyOf" in schema else dict(schema)


def _of_field(table: Table, parameter: Parameter) -> Json:
    """The schema of a value of a field: its type, within its limits."""
    message, name = place(table.new().message, parameter.becomes)
    descriptor = message.DESCRIPTOR.fields_by_name[name]
    limit = LIMITS.get(f"{message.DESCRIPTOR.name}.{name}")
    if not isinstance(limit, Entries):
        return _one(descriptor, limit)
    item = _one(descriptor, limit.of)
    return {"anyOf": [item, {"type": "array", "items": item, "maxItems": limit.most}]}


def _one(descriptor: FieldDescriptor, limit: Limit | None) -> Json:
    kind = "string"
    if descriptor.cpp_type in INTEGERS:
        kind = "integer"
    elif descriptor.cpp_type in REALS:
        kind = "number"
    elif descriptor.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
        kind = "boolean"
    return {"type": kind, **dict(_bounds(limit))}


def _bounds(limit: Limit | None) -> Iterator[tuple[str, float]]:
    if isinstance(limit, Range):
        yield "exclusiveMinimum" if limit.above else "minimum", limit.low
        if limit.high != math.inf:
            yield "maximum", limit.high
    elif isinstance(limit, Text) and limit.unit == "characters":
        yield "maxLength", limit.most


# ---- the page --------------------------------------------------------------------------------------------------------

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
    "table{border-collapse:collapse;width:100%}td,th{border-top:1px solid #8884;padding:.2em .6em;text-align:left;"
    "vertical-align:top}code{font-size:90%}"
)
# The page loads nothing and runs nothing.
PAGE_HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}


def page(version: str) -> bytes:
    """The document as a page that needs no network."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Loraplex {_shown(version)}</title>"
        f"<style>{STYLE}</style><h1>Loraplex {_shown(version)}</h1>"
        "<p>As JSON: <a href=/openapi.json>openapi.json</a>. <code>null</code> is the same as nothing.</p>"
    ]
    for path, methods in document(version)["paths"].items():
        for method, call in methods.items():
            parts.append(f"<h2><code>{method.upper()} {_shown(path)}</code></h2><p>{_shown(call['summary'])}</p>")
            parts += _rows(call)
    return "".join(parts).encode()


def _rows(call: Json) -> Iterator[str]:
    if "requestBody" not in call:
        return
    schema = call["requestBody"]["content"]["application/json"]["schema"]
    yield "<table><tr><th>parameter<th>type<th>"
    for name, value in schema["properties"].items():
        yield f"<tr><td><code>{_shown(name)}</code><td>{_shown(_kind(value))}<td>{_shown(value.get('description', ''))}"
    yield "</table>"


def _kind(schema: Json) -> str:
    """The type of a value, in a word or two."""
    if "anyOf" in schema:
        return " or ".join(kind for each in schema["anyOf"] if (kind := _kind(each)))
    kinds = schema.get("type", [])
    return " or ".join(kind for kind in ([kinds] if isinstance(kinds, str) else kinds) if kind != "null")


def _shown(text: str) -> str:
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))
