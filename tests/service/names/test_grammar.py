"""The names of resources in requests."""

import pytest

from loraplex_service.errors import InvalidRequest
from loraplex_service.names.grammar import adapter_name, model_id, route_name, tenant_id


def test_names_give_their_ids() -> None:
    assert model_id("models/llama-3.1-8b", "name") == "llama-3.1-8b"
    assert tenant_id("tenants/acme", "parent") == "acme"
    assert tenant_id("tenants/-", "parent", all_allowed=True) is None
    assert adapter_name("tenants/a/adapters/b@0123456789ab", "name") == "tenants/a/adapters/b@0123456789ab"


@pytest.mark.parametrize(
    "name", ["", "models", "models/", "models/a/b", "models/A", "models/a\n", "models/" + "a" * 64]
)
def test_what_is_no_name_of_a_model_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        model_id(name, "name")


@pytest.mark.parametrize(
    "name",
    ["pirate", "tenants/a/adapters/b@", "tenants/a/adapters/b@xyz", "tenants/-/adapters/b", "tenants/a/adapters/.."],
)
def test_what_is_no_name_of_an_adapter_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="does not name an adapter here"):
        adapter_name(name, "name")


def test_a_tenant_of_all_is_refused_where_one_is_needed() -> None:
    with pytest.raises(InvalidRequest, match=r"tenants/\{tenant\} is expected"):
        tenant_id("tenants/-", "parent")


@pytest.mark.parametrize("name", ["", "a", "tenants/a/routes/", "tenants/a/routes/B", "tenants/a/adapters/b"])
def test_what_is_no_name_of_a_route_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name of a route"):
        route_name(name, "name")
