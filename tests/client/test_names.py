"""Names of enumerators."""

import pytest

from loraplex import enum_name
from loraplex.v1.adapters_pb2 import ADAPTER_RESIDENCY_HOST, Adapter
from loraplex.v1.inference_pb2 import FINISH_REASON_MAX_TOKENS, Finished
from loraplex.v1.models_pb2 import Model


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
