"""Every field of the contract is read, answered or refused; every enumerator of an answer is given."""

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest
from google.api.field_behavior_pb2 import FieldBehavior, field_behavior
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor, MethodDescriptor

from loraplex.v1.errors_pb2 import ErrorReason
from loraplex_engine.link.sampling_params import FinishReason
from loraplex_service.dialect_stubs.pool import service_of
from loraplex_service.dialects.tables import TABLES
from loraplex_service.validation.checks import UNSUPPORTED_FIELDS
from loraplex_service.validation.dialects import REFUSED, kind_of
from tests.proto.contract import FILES
from tests.proto.field_uses import Field, Uses, field_uses
from tests.service.dialects.test_definitions import SERVICES

SERVICE = Path("service/loraplex_service")
CLIENTS = (f"{SERVICE}/commands/",)  # they call servers
SERVER = [
    path for path in sorted(SERVICE.rglob("*.py")) if not str(path).startswith(CLIENTS) and "_pb2" not in path.name
]
OUTPUT_ONLY = FieldBehavior.Value("OUTPUT_ONLY")

# Fields that are read by a name that is data where they are read: the file in which the name is written.
READ_BY_NAME = {
    "Sampling": SERVICE / "requests/sampling.py",  # `given("temperature")`: all of them alike
    "ChatMessage": SERVICE / "requests/prompts.py",  # handed to templates under their own names, where present
}

# Messages of dialects of which one field is set at a time: any other than the one that is meant is refused.
ONE_OF = ("kserve_v2_pb2.InferParameter", "kserve_v2_pb2.ModelRepositoryParameter")

# Fields that are set by a name that is data where they are set, likewise.
SET_BY_NAME = {"StreamGenerateResponse": SERVICE / "requests/inference.py"}  # its events, by their types

# What is kept and comes back as it was given: nothing needs to look at it.
KEPT = {("Route", "labels")}


@pytest.fixture(scope="module")
def uses() -> Uses:
    return field_uses(SERVER)


def methods() -> Iterator[MethodDescriptor]:
    for file in FILES:
        for service in file.services_by_name.values():
            yield from service.methods


def reachable(roots: Iterator[Descriptor], through: Callable[[FieldDescriptor], bool]) -> set[Descriptor]:
    """The messages of the contract that these are made of, by fields of that kind."""
    found: set[Descriptor] = set()
    waiting = list(roots)
    while waiting:
        message = waiting.pop()
        is_ours = message.full_name.startswith("loraplex.v1.") and not message.GetOptions().map_entry
        if message in found or not is_ours:
            continue
        found.add(message)
        waiting += [field.message_type for field in message.fields if field.message_type is not None and through(field)]
    return found


def is_output(field: FieldDescriptor) -> bool:
    return OUTPUT_ONLY in field.GetOptions().Extensions[field_behavior]


def is_refused(field: FieldDescriptor) -> bool:
    return ".".join(field.full_name.split(".")[-2:]) in UNSUPPORTED_FIELDS


def key(field: FieldDescriptor) -> Field:
    return field.full_name.removeprefix("loraplex.v1.").rpartition(".")[0], field.name


def strings(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def by_name(files: Mapping[str, Path]) -> set[Field]:
    return {(message, name) for message, path in files.items() for name in strings(path)}


def asked() -> set[Descriptor]:
    inputs = (method.input_type for method in methods())
    return reachable(inputs, lambda field: not is_output(field) and not is_refused(field))


def answered() -> set[Descriptor]:
    return reachable((method.output_type for method in methods()), lambda field: True)


@pytest.mark.slow
def test_every_field_of_a_request_is_read_or_refused(uses: Uses) -> None:
    fields = [
        field for message in asked() for field in message.fields if not is_output(field) and not is_refused(field)
    ]
    assert sorted({key(field) for field in fields} - uses.read - by_name(READ_BY_NAME) - KEPT) == []


@pytest.mark.slow
def test_every_field_of_an_answer_is_set(uses: Uses) -> None:
    requests = asked()
    fields = [
        field for message in answered() for field in message.fields if message not in requests or is_output(field)
    ]
    assert sorted({key(field) for field in fields} - uses.given - by_name(SET_BY_NAME)) == []


def of_dialects(kinds: str) -> set[Field]:
    """The fields of all requests, or of all answers, of the dialects, but for what is in refused ones."""
    found: set[Field] = set()
    waiting = [getattr(method, kinds) for name in SERVICES for method in service_of(name).methods]
    seen = set[Descriptor]()
    while waiting:
        message = waiting.pop()
        is_map = message.GetOptions().map_entry
        if message in seen or message.file.package == "google.protobuf":
            continue
        seen.add(message)
        for field in message.fields:
            name = f"{kind_of(message)}.{field.name}"
            if name not in REFUSED and not is_map:
                found.add(of_dialect(field))
            if field.message_type is not None and name not in REFUSED:
                waiting.append(field.message_type)
    return found


def by_tables() -> set[Field]:
    """The fields that a table of a dialect reads, with all that is in them."""
    found: set[Field] = set()
    for fields, request in TABLES:
        for entry in fields.all:
            message: Descriptor | None = request
            for name in entry.name.split("."):
                assert message is not None
                field = message.fields_by_name[name]
                found.add(of_dialect(field))
                message = field.message_type
            if message is not None and not message.GetOptions().map_entry:
                found |= {of_dialect(field) for field in message.fields}
    return found


def of_dialect(field: FieldDescriptor) -> Field:
    message = field.containing_type
    assert message is not None
    own = message.full_name.removeprefix(f"{message.file.package}.")
    return f"{Path(message.file.name).stem}_pb2.{own}", field.name


@pytest.mark.slow
def test_every_field_of_a_dialects_request_is_read_or_refused(uses: Uses) -> None:
    fields = {(message, name) for message, name in of_dialects("input_type") if message not in ONE_OF}
    assert sorted(fields - uses.read - by_tables()) == []


@pytest.mark.slow
def test_every_field_of_a_dialects_answer_is_set(uses: Uses) -> None:
    assert sorted(of_dialects("output_type") - of_dialects("input_type") - uses.given) == []


# ---- enumerators -----------------------------------------------------------------------------------------------------

ROOMS = [*SERVER, *Path("adapters").rglob("*.py"), *Path("engine").rglob("*.py")]


@cache
def words() -> set[str]:
    """Every name and every text in the code."""
    found: set[str] = set()
    for path in ROOMS:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Name(id=word) | ast.Attribute(attr=word) | ast.Constant(value=str(word)):
                    found.add(word)
    return found


def enums_of_answers() -> set[EnumDescriptor]:
    return {field.enum_type for message in answered() for field in message.fields if field.enum_type is not None}


def test_every_enumerator_of_an_answer_is_given_somewhere() -> None:
    by_engine = {f"FINISH_REASON_{reason.name}" for reason in FinishReason}  # `OutputBuilder` makes them of these
    named = {
        value.name
        for enum in enums_of_answers()
        for value in enum.values
        if not value.name.endswith("_UNSPECIFIED") and enum.full_name != "loraplex.v1.OnCold"  # asked for, never given
    }
    assert sorted(named - words() - by_engine) == []


def test_every_reason_of_an_error_is_given_somewhere() -> None:
    reasons = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.keys()} - {"UNSPECIFIED"}  # noqa: SIM118 - an enum
    assert sorted(reasons - words()) == []
