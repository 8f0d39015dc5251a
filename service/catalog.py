"""What a request's field `model` means, and everything that a request needs of the model that it names."""

import re
from dataclasses import dataclass
from typing import NoReturn, Protocol

from adapters.key import AdapterKey
from engine.client import EngineClient
from engine.messages import ModelLimits
from loraplex.v1.generation_pb2 import Sampling
from loraplex.v1.routes_pb2 import ResolvedTarget
from service.errors import InvalidRequest, NotFound, PermissionDenied
from service.interceptors import SHARED_TENANT
from service.text import Tokenizer


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A base model that serves: a snapshot, good for the life of one request. A restarted engine makes a new one."""

    name: str  # bare id: "demo", not "models/demo"
    revision: str  # of the weights: a commit or a digest
    limits: ModelLimits
    client: EngineClient
    tokenizer: Tokenizer
    default_sampling: Sampling  # fields that are absent have the contract's defaults


class Models(Protocol):
    """The base models that the operator configured."""

    def serving(self, name: str) -> LoadedModel:
        """The model with this bare id.

        Raises NotFound (MODEL_NOT_FOUND), FailedPrecondition (MODEL_UNLOADED) or Unavailable (MODEL_LOADING,
        ENGINE_RESTARTING).
        """


@dataclass(frozen=True, slots=True)
class ServableAdapter:
    """One version of an adapter that requests may use."""

    key: AdapterKey
    path: str  # the directory with its files
    base_model: str  # bare id of the model that it adapts

    @property
    def version_name(self) -> str:
        tenant, adapter_id = self.key.name.split("/")
        return f"tenants/{tenant}/adapters/{adapter_id}@{self.key.digest[:12]}"


class Adapters(Protocol):
    """The adapters that are registered."""

    def servable(self, tenant: str, adapter_id: str, version: str | None) -> ServableAdapter | None:
        """The version with these first 12 digits of its digest; None: the current one. None if there is none.

        Raises Unavailable (ADAPTER_COLD) while it is being read and checked, FailedPrecondition (ADAPTER_INVALID, …)
        if it proved unusable.
        """


@dataclass(frozen=True, slots=True)
class Target:
    """What a request runs on."""

    model: LoadedModel
    adapter: ServableAdapter | None = None  # None: the base model alone

    def resolved(self, fell_back_to_base: bool = False) -> ResolvedTarget:
        """What the caller is told. `fell_back_to_base`: the adapter was cold, and the request allowed to go without."""
        adapter = None if fell_back_to_base else self.adapter
        return ResolvedTarget(
            model=f"models/{self.model.name}",
            model_revision=self.model.revision,
            quantization=self.model.limits.quantization,
            adapter_version=adapter.version_name if adapter is not None else "",
            fell_back_to_base=fell_back_to_base,
        )


_ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_VERSION = r"(?:@(?P<version>[0-9a-f]{12}))?"
_MODEL_NAME = re.compile(rf"models/(?P<model>{_ID})")
_ADAPTER_NAME = re.compile(rf"tenants/(?P<tenant>{_ID})/adapters/(?P<adapter>{_ID}){_VERSION}")
_ROUTE_NAME = re.compile(rf"tenants/(?P<tenant>{_ID})/routes/(?P<route>{_ID})")
_BARE_ID = re.compile(rf"(?P<id>{_ID}){_VERSION}")


class Catalog:
    """Finds the target of a request by its name, on behalf of a tenant."""

    def __init__(self, models: Models, adapters: Adapters) -> None:
        self._models = models
        self._adapters = adapters

    def resolve(self, tenant: str, name: str, path: str = "spec.model") -> Target:
        """What `name` means to this tenant; bare ids are looked up with the tenant, then as shared, then as a model.

        `path`: the field that holds the name. Raises InvalidRequest, NotFound, PermissionDenied, and what
        `Models.serving` and `Adapters.servable` raise.
        """
        if match := _MODEL_NAME.fullmatch(name):
            return Target(self._models.serving(match["model"]))
        if match := _ADAPTER_NAME.fullmatch(name):
            _check_may_see(tenant, match["tenant"])
            return self._adapter(match["tenant"], match["adapter"], match["version"]) or _not_found("ADAPTER", name)
        if match := _ROUTE_NAME.fullmatch(name):
            _check_may_see(tenant, match["tenant"])
            _not_found("ROUTE", name)
        if match := _BARE_ID.fullmatch(name):
            for owner in dict.fromkeys((tenant, SHARED_TENANT)):
                target = self._adapter(owner, match["id"], match["version"])
                if target is not None:
                    return target
            return Target(self._models.serving(name)) if match["version"] is None else _not_found("ADAPTER", name)
        raise InvalidRequest.at(
            path,
            f"{name[:200]!r} is no name: give models/{{model}}, tenants/{{tenant}}/adapters/{{adapter}}, with "
            "@{version} (12 hex digits) or without, or the id alone",
        )

    def _adapter(self, tenant: str, adapter_id: str, version: str | None) -> Target | None:
        adapter = self._adapters.servable(tenant, adapter_id, version)
        return Target(self._models.serving(adapter.base_model), adapter) if adapter is not None else None


def _check_may_see(tenant: str, owner: str) -> None:
    if owner not in (tenant, SHARED_TENANT):
        raise PermissionDenied(f"tenant {tenant!r} may not use what belongs to tenant {owner!r}")


def _not_found(kind: str, name: str) -> NoReturn:
    raise NotFound(
        f"{kind}_NOT_FOUND", name, f"there is no {kind.lower()} {name!r}; list those there are, or check its spelling"
    )
