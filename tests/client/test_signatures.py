"""What help() and inspect.signature show of the clients."""

import importlib
import inspect
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api.field_behavior_pb2 import OUTPUT_ONLY, field_behavior
from google.protobuf import descriptor_pool

import loraplex
from loraplex import AdminClient, AsyncAdminClient, AsyncClient, Client
from loraplex.generation import GenerateOptions, SharedOptions

GENERATOR = Path(loraplex.__file__).parents[1] / "generate.py"
CLIENTS: list[type] = [AsyncClient, AsyncAdminClient, Client, AdminClient]
SERVICES = ["InferenceService", "PoolingService", "TokenizerService"]
SERVICES += ["ModelService", "AdapterService", "RouteService", "ServerService"]


def methods(client: type) -> dict[str, Callable[..., Any]]:
    return {name: value for name, value in inspect.getmembers(client, inspect.isfunction) if not name.startswith("_")}


CALLABLES = {f"{client.__name__}.{name}": method for client in CLIENTS for name, method in methods(client).items()}
CALLABLES |= {client.__name__: client.__init__ for client in CLIENTS}  # type: ignore[misc]
CALLABLES |= {"generate_spec": loraplex.generate_spec}
each_callable = pytest.mark.parametrize("function", list(CALLABLES.values()), ids=list(CALLABLES))


def documented(function: Callable[..., Any]) -> dict[str, str]:
    """The line of documentation of each option."""
    _, _, lines = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    joined = lines.replace("\n        ", " ").splitlines()
    return dict(line.strip().split(": ", 1) for line in joined)


def kinds_in(annotation: Any) -> Iterator[Any]:
    """An annotation and all that it is made of."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from kinds_in(part)


def test_the_generated_files_are_what_the_generator_writes() -> None:
    result = subprocess.run([sys.executable, str(GENERATOR), "check"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@each_callable
def test_each_option_has_a_name_a_type_and_a_line_of_documentation(function: Callable[..., Any]) -> None:
    options = [option for option in inspect.signature(function).parameters.values() if option.name != "self"]
    assert [option.name for option in options] == list(documented(function))
    assert all(option.annotation is not option.empty for option in options)
    assert {option.kind for option in options} <= {
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    }


@each_callable
def test_a_default_that_says_nothing_by_itself_is_explained(function: Callable[..., Any]) -> None:
    lines = documented(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is None:
            assert "None: " in lines[parameter.name]
        if parameter.default == "":
            assert '"": ' in lines[parameter.name]


@each_callable
def test_what_is_returned_can_be_imported(function: Callable[..., Any]) -> None:
    returned = inspect.signature(function).return_annotation
    assert returned is not inspect.Signature.empty
    for kind in kinds_in(returned):
        assert not isinstance(kind, typing.TypeVar)
        assert kind is not Any
        if isinstance(kind, type) and kind is not type(None):
            origin = typing.get_origin(kind) or kind
            assert getattr(importlib.import_module(origin.__module__), origin.__name__) is origin


@pytest.mark.parametrize(("asynchronous", "blocking"), [(AsyncClient, Client), (AsyncAdminClient, AdminClient)])
def test_both_kinds_of_client_take_the_same_options(asynchronous: type, blocking: type) -> None:
    assert {name: inspect.signature(function).parameters for name, function in methods(asynchronous).items()} == {
        name: inspect.signature(function).parameters for name, function in methods(blocking).items()
    }


def test_options_of_a_generation_are_shown_with_type_and_default() -> None:
    shown = str(inspect.signature(Client.generate))
    assert "temperature: float | None = None" in shown
    assert "wait_for_ready: bool = False" in shown
    assert shown.endswith(" -> loraplex.v1.inference_pb2.GenerateResponse")


# ---- every field of a request is an option -------------------------------------------------------------------------

# Messages whose fields are options themselves.
SPREAD = {"GenerateSpec", "Sampling", "Stopping", "OutputOptions", "Constraint", "CacheOptions", "AdapterPolicy"}
SPREAD |= {"BeamSearch", "Drafts", "RunOptions", "StreamOptions", "Prompt", "Chat", "Adapter", "CreateAdapterRequest"}
WHOLE = {"specs", "prompts", "default_constraint"}  # options that are such messages
OTHER_NAMES = {"parent": "tenant", "file": "directory", "chunk": "directory", "messages": "prompt"}
LEFT_OUT = {
    "list_adapters": {"page_size", "page_token"},  # the client reads all pages
    "list_models": {"page_size", "page_token"},
    "list_routes": {"page_size", "page_token"},
    "create_adapter": {"name", "version", "etag"},  # the server's to choose
    "upload_adapter": {"name", "version", "etag", "source"},
    "update_adapter": {"base_model", "source", "digest", "update_mask"},  # never change; the mask is what is given
    "score": set(GenerateOptions.__annotations__) - set(SharedOptions.__annotations__),  # refused: nothing is generated
}


def request_of(method: str) -> Any:
    """The request of a method of the contract, by the client's name of it; None for what is not in the contract."""
    name = "".join(word.capitalize() for word in method.split("_"))
    for service in SERVICES:
        found: Any = descriptor_pool.Default().FindServiceByName(f"loraplex.v1.{service}")
        if name in found.methods_by_name:
            return found.methods_by_name[name].input_type
    return None


def settable(message: Any) -> Iterator[str]:
    """The names of the options that the fields of a message need."""
    for field in message.fields:
        kind = field.message_type.name if field.message_type is not None else ""
        if OUTPUT_ONLY in field.GetOptions().Extensions[field_behavior]:
            continue
        if field.containing_oneof is not None and field.containing_oneof.name == "content":
            yield "prompt"
        if kind in SPREAD and field.name not in WHOLE:
            yield from settable(field.message_type)
        elif field.containing_oneof is None or field.containing_oneof.name != "content":
            yield OTHER_NAMES.get(field.name, field.name)


@pytest.mark.parametrize(
    ("client", "name"),
    [(client, name) for client in (Client, AdminClient) for name in methods(client) if request_of(name) is not None],
)
def test_every_field_of_a_request_is_an_option(client: type, name: str) -> None:
    options = set(inspect.signature(methods(client)[name]).parameters)
    assert set(settable(request_of(name))) - LEFT_OUT.get(name, set()) - options == set()
