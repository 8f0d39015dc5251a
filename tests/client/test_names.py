"""Names of enumerators."""

import copy
import importlib
import logging
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from google.protobuf.message_factory import GetMessageClass

import loraplex.v1
from loraplex import enum_name
from loraplex.v1.adapters_pb2 import ADAPTER_RESIDENCY_HOST, Adapter
from loraplex.v1.inference_pb2 import FINISH_REASON_EOS, FINISH_REASON_MAX_TOKENS, Finished
from loraplex.v1.models_pb2 import MODEL_CAPABILITY_ADAPTERS, MODEL_CAPABILITY_CHAT, Model

FINISHED = Finished(reason=FINISH_REASON_EOS)


def enum_fields() -> Iterator[Any]:
    """Every field of the contract that holds enumerators."""
    for module in pkgutil.iter_modules(loraplex.v1.__path__):
        if module.name.endswith("_pb2"):
            descriptor: Any = importlib.import_module(f"loraplex.v1.{module.name}").DESCRIPTOR
            messages = list(descriptor.message_types_by_name.values())
            while messages:
                message = messages.pop()
                messages += message.nested_types
                yield from (field for field in message.fields if field.enum_type is not None)


def test_an_enumerator_has_its_name_without_its_prefix() -> None:
    assert enum_name(Finished(reason=FINISH_REASON_MAX_TOKENS), "reason") == "MAX_TOKENS"
    assert enum_name(Adapter(state=Adapter.STATE_LOADING), "state") == "LOADING"
    assert enum_name(Adapter(residency=ADAPTER_RESIDENCY_HOST), "residency") == "HOST"
    assert enum_name(Model(), "state") == "UNSPECIFIED"


def test_an_enumerator_of_a_newer_server_is_its_number() -> None:
    assert enum_name(Finished(reason=99), "reason") == "99"  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["nothing", "name", "capabilities"])
def test_a_field_without_an_enumerator_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match="no field"):
        enum_name(Model(), field)


@pytest.mark.parametrize("field", list(enum_fields()), ids=lambda field: field.full_name)
def test_every_field_of_the_contract_prints_the_name_of_its_enumerator(field: Any) -> None:
    message = GetMessageClass(field.containing_type)()
    last = field.enum_type.values[-1]
    value = getattr(message, field.name)
    if isinstance(value, int):
        setattr(message, field.name, last.number)
        assert str(getattr(message, field.name)) == last.name
    else:
        value.append(last.number)
        assert str(value) == f"[{last.name}]"


@pytest.mark.parametrize("show", [str, repr, format, "{}".format])
def test_an_enumerator_prints_its_name(show: Callable[[object], str]) -> None:
    assert show(FINISHED.reason) == "FINISH_REASON_EOS"


def test_an_enumerator_is_logged_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("mine").warning("ended: %s", FINISHED.reason)
    assert caplog.messages == ["ended: FINISH_REASON_EOS"]


def test_a_width_is_for_the_name_and_a_kind_of_number_for_the_number() -> None:
    assert (f"{FINISHED.reason:>20}", f"{FINISHED.reason:03d}") == ("   FINISH_REASON_EOS", "002")


def test_an_enumerator_is_still_its_number() -> None:
    assert FINISHED.reason == FINISH_REASON_EOS == 2
    assert {FINISH_REASON_EOS: "found"}[FINISHED.reason] == "found"
    assert Finished(reason=FINISHED.reason).SerializeToString() == b"\x10\x02"
    assert FINISHED.output_index == 0


def test_a_copied_enumerator_keeps_its_name() -> None:
    assert str(copy.deepcopy(FINISHED.reason)) == "FINISH_REASON_EOS"


def test_an_enumerator_of_a_newer_server_prints_its_digits() -> None:
    finished = Finished.FromString(b"\x10\x63")
    assert (f"{finished.reason}", finished.reason, repr(finished)) == ("99", 99, "reason: 99\n")


def test_enumerators_of_a_repeated_field_are_those_of_the_field() -> None:
    model = Model(capabilities=[MODEL_CAPABILITY_CHAT])
    model.capabilities.append(MODEL_CAPABILITY_ADAPTERS)
    model.capabilities.insert(0, 99)  # type: ignore[arg-type]
    assert f"{model.capabilities[1:]}" == "[MODEL_CAPABILITY_CHAT, MODEL_CAPABILITY_ADAPTERS]"
    assert str(model.capabilities[0]) == "99"
    assert MODEL_CAPABILITY_CHAT in model.capabilities
    del model.capabilities[0]
    model.capabilities[0] = MODEL_CAPABILITY_ADAPTERS
    assert model.capabilities == [MODEL_CAPABILITY_ADAPTERS] * 2
    assert MessageToDict(model) == {"capabilities": ["MODEL_CAPABILITY_ADAPTERS"] * 2}
