"""The visible part of shared resources: callers see neither who else uses them, nor the server's paths."""

from loraplex.v1.models_pb2 import Model
from loraplex_adapters.versions import SHARED_TENANT
from loraplex_service.call import find_call
from loraplex_service.names.grammar import tenant_id

_INSIDE_A_MODEL = ("source", "memory_bytes", "running_requests", "waiting_requests", "error")


def seen_model(model: Model) -> Model:
    """Remove the fields that the present caller may not see, in place, and return the model."""
    call = find_call()
    if call is not None and not call.is_admin:
        for name in _INSIDE_A_MODEL:
            model.ClearField(name)  # type: ignore[arg-type]  # it is a name of a field
    return model


def seen_tenants(parent: str) -> set[str] | None:
    """The tenants that `tenants/{tenant}` or `tenants/-` stands for, of those that the caller may see. None: all.

    Raises InvalidRequest.
    """
    tenant = tenant_id(parent, "parent", all_allowed=True)
    if tenant is not None:
        return {tenant}
    call = find_call()
    return None if call is None or call.is_admin else {call.tenant, SHARED_TENANT}
