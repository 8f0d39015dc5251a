"""What the tables of several endpoints have in common: parameters, and values that are no field as they are."""

import json
from collections.abc import Mapping
from typing import Any

from loraplex import constraint
from loraplex.v1.generation_pb2 import Constraint, GenerateSpec, OutputOptions
from loraplex_service.http import conversations as said
from loraplex_service.http.parameters import (
    OBJECT,
    STRING,
    Draft,
    Parameter,
    bounded,
    flag,
    items,
    mapping,
    refuse_others,
    refused,
    scalar,
    text,
    wrong,
)

SCHEMA = ("name", "description", "schema", "strict")  # a schema always counts, with `strict` and without


def new_spec() -> Draft:
    """A generation of which nothing is said yet."""
    return Draft(GenerateSpec())


def put_stream(draft: Draft, value: Any) -> None:
    """Whether the answer comes as a stream."""
    draft.stream = flag(value)


def put_metadata(draft: Draft, value: Any) -> None:
    """Labels of the caller's accounting."""
    for key, content in bounded(mapping(value), "GenerateSpec.labels").items():
        if not isinstance(content, str):
            raise wrong(f"metadata.{key[:100]}", "must be a text")
        draft.message.labels[key] = content
        draft.paths.append((f"labels[{key}]", f"metadata.{key}"))


def put_routing_key(draft: Draft, value: Any) -> None:
    """Which replica has the beginning of the prompt in its cache."""
    draft.routing_key = text(value)


def new_chat(name: str = "messages") -> Draft:
    """A generation that goes on with a conversation, which the parameter of this name has."""
    draft = new_spec()
    said.begin(draft, name)
    return draft


def new_turn(name: str = "messages") -> Draft:
    """A generation that goes on with a conversation, by one output: its API has no place for more."""
    draft = new_chat(name)
    draft.message.sampling.n = 1
    draft.message.stopping.fit_max_tokens = True  # its clients send the most that a model may write, always
    return draft


def check_single(draft: Draft, *untold: str) -> None:
    """Raise Refusal for more than one output, and for what an answer has no place for: fields of OutputOptions."""
    said.check_tools(draft)
    if draft.message.sampling.n != 1:
        raise wrong("loraplex.sampling.n", "one output is told here; ask for several at /v1/chat/completions")
    for name in untold:
        if _is_asked(draft.message.output, name):
            problem = "is not told here: its answers have no place for it; /v1/chat/completions has"
            raise wrong(f"loraplex.output.{name}", problem, code="unsupported_parameter")


def _is_asked(output: OutputOptions, name: str) -> bool:
    value = getattr(output, name)
    if not output.DESCRIPTOR.fields_by_name[name].has_presence:  # a list
        return bool(value)
    return output.HasField(name) and value is not False  # type: ignore[arg-type]


# ---- forms -----------------------------------------------------------------------------------------------------------


def constrain(draft: Draft, form: Constraint) -> None:
    """Ask for a form of the output. Raises ValueError where there is one already."""
    if draft.message.HasField("constraint"):
        raise ValueError("another parameter asks for a form already; set one of them")
    draft.message.constraint.CopyFrom(form)


def form_of(kind: str, value: Any) -> Constraint:
    """The form of one kind, as vLLM names them."""
    match kind:
        case "json":
            return constraint(json_schema=value if isinstance(value, str) else schema_text(value))
        case "json_object":
            return constraint(json_object=flag(value))
        case "choice":
            return constraint(choices=[text(each) for each in items(value, "Choices.values")])
        case "regex":
            return constraint(regex=text(value))
    return constraint(grammar=text(value))


def schema_text(value: Any) -> str:
    """A JSON Schema as the contract has it."""
    return json.dumps(mapping(value), ensure_ascii=False)


def put_form(draft: Draft, value: Any, name: str, inner: str = "") -> None:
    """Ask for a form by the words of OpenAI's APIs. `inner`: the key of the object that has the schema; "": itself."""
    form = mapping(value)
    kind, holder = form.get("type"), mapping(form.get(inner) or {}) if inner else form
    known = SCHEMA if kind == "json_schema" else ()
    refuse_others(form, ("type", inner) if inner else ("type", *known), name)
    refuse_others(holder, ("type", *known), f"{name}.{inner}" if inner else name)
    where = f"{name}.{inner}.schema" if inner else f"{name}.schema"
    if kind == "json_schema" and not isinstance(holder.get("schema"), dict):
        raise wrong(where, "must be an object, the JSON Schema")
    draft.paths += [("constraint", name), ("constraint.json_schema", where)]
    constrain(draft, _response_form(kind, holder))


def _response_form(kind: Any, holder: Mapping[str, Any]) -> Constraint:
    match kind:
        case "text":
            return constraint(any_text=True)
        case "json_object":
            return constraint(json_object=True)
        case "json_schema":
            return constraint(json_schema=schema_text(holder["schema"]))
    raise ValueError('type must be "text", "json_object" or "json_schema"')


# ---- parameters ------------------------------------------------------------------------------------------------------

SPEC = Parameter(
    "loraplex",
    "",
    said.put_spec,
    "further fields of `GenerateSpec` by their own names; others come on top",
    schema=OBJECT,
)
MODEL = scalar("model", "model", "a model, an adapter, a version, a route or a weighted sum")
METADATA = Parameter("metadata", "labels", put_metadata, schema=OBJECT)
CACHE_KEY = Parameter("prompt_cache_key", "", put_routing_key, "as the header `loraplex-routing-key`", schema=STRING)
NOT_KEPT = (
    refused("moderation", "nothing is judged"),
    refused("prompt_cache_options", "what prompts begin with is cached without being asked", {"mode": "implicit"}),
    refused("prompt_cache_retention", "what is cached stays while there is room", "in_memory"),
)
