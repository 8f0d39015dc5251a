"""The role that each method requires, and the tenant whose resources it touches. Other methods are refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loraplex_adapters.versions import SHARED_TENANT
from loraplex_service.auth.principal import Principal, Role
from loraplex_service.errors import PermissionDenied


@dataclass(frozen=True, slots=True)
class Rule:
    """The role and the tenant that a method requires of its caller. ADMIN may call everything."""

    role: Role | None  # None: any caller, even without credentials
    or_role: Role | None = None  # a second role that may call the method
    resource: str = ""  # the field that names a resource under tenants/{tenant}; "": the data plane checks
    reads: bool = False  # resources of the tenant `shared` may be read by all
    own_if_absent: bool = False  # an absent name means the caller's own tenant


def _reads(resource: str, own_if_absent: bool = False) -> Rule:
    return Rule(Role.INFERENCE, Role.ADAPTERS, resource, reads=True, own_if_absent=own_if_absent)


def _writes(resource: str) -> Rule:
    return Rule(Role.ADAPTERS, resource=resource)


INFERENCE, ADMIN, ANY = Rule(Role.INFERENCE), Rule(Role.ADMIN), Rule(Role.INFERENCE, Role.ADAPTERS)

PUBLIC = Rule(None)

RULES: Mapping[str, Rule] = {
    "/loraplex.v1.InferenceService/Generate": INFERENCE,
    "/loraplex.v1.InferenceService/StreamGenerate": INFERENCE,
    "/loraplex.v1.InferenceService/BatchGenerate": INFERENCE,
    "/loraplex.v1.InferenceService/Score": INFERENCE,
    "/loraplex.v1.InferenceService/CancelGeneration": INFERENCE,
    "/loraplex.v1.PoolingService/Embed": INFERENCE,
    "/loraplex.v1.PoolingService/Classify": INFERENCE,
    "/loraplex.v1.PoolingService/Rerank": INFERENCE,
    "/loraplex.v1.TokenizerService/Tokenize": INFERENCE,
    "/loraplex.v1.TokenizerService/Detokenize": INFERENCE,
    "/loraplex.v1.AdapterService/GetAdapter": _reads("name"),
    "/loraplex.v1.AdapterService/ListAdapters": _reads("parent"),
    "/loraplex.v1.AdapterService/WatchAdapters": _reads("parent"),
    "/loraplex.v1.AdapterService/CreateAdapter": ADMIN,  # it reads the server's directories, which tenants share
    "/loraplex.v1.AdapterService/UploadAdapter": _writes("header.parent"),
    "/loraplex.v1.AdapterService/UpdateAdapter": _writes("adapter.name"),
    "/loraplex.v1.AdapterService/DeleteAdapter": _writes("name"),
    "/loraplex.v1.AdapterService/LoadAdapter": _writes("name"),
    "/loraplex.v1.AdapterService/UnloadAdapter": _writes("name"),
    "/loraplex.v1.RouteService/GetRoute": _reads("name"),
    "/loraplex.v1.RouteService/ListRoutes": _reads("parent"),
    "/loraplex.v1.RouteService/ResolveTarget": _reads("parent", own_if_absent=True),
    "/loraplex.v1.RouteService/UpdateRoute": _writes("route.name"),
    "/loraplex.v1.RouteService/DeleteRoute": _writes("name"),
    "/loraplex.v1.ModelService/GetModel": ANY,
    "/loraplex.v1.ModelService/ListModels": ANY,
    "/loraplex.v1.ModelService/WatchModels": ADMIN,
    "/loraplex.v1.ModelService/LoadModel": ADMIN,
    "/loraplex.v1.ModelService/UnloadModel": ADMIN,
    "/loraplex.v1.ServerService/GetServerInfo": ANY,
    "/loraplex.v1.ServerService/WatchLoad": ADMIN,
    "/loraplex.v1.ServerService/WatchUsage": ADMIN,
    "/inference.GRPCInferenceService/ServerLive": PUBLIC,
    "/inference.GRPCInferenceService/ServerReady": PUBLIC,
    "/inference.GRPCInferenceService/ServerMetadata": ANY,
    "/inference.GRPCInferenceService/ModelReady": ANY,
    "/inference.GRPCInferenceService/ModelMetadata": ANY,
    "/inference.GRPCInferenceService/ModelConfig": ANY,
    "/inference.GRPCInferenceService/ModelInfer": INFERENCE,
    "/inference.GRPCInferenceService/ModelStreamInfer": INFERENCE,
    "/inference.GRPCInferenceService/RepositoryIndex": ANY,
    "/inference.GRPCInferenceService/RepositoryModelLoad": ADMIN,
    "/inference.GRPCInferenceService/RepositoryModelUnload": ADMIN,
    "/vllm.Inference/Generate": INFERENCE,
    "/vllm.Inference/GenerateStream": INFERENCE,
    "/vllm.Control/GetServerInfo": ANY,
    "/vllm.Control/GetModelInfo": ANY,
    "/vllm.Control/Abort": INFERENCE,
    "/vllm.Control/LoadLora": ADMIN,
    "/vllm.Control/UnloadLora": ADMIN,
    "/vllm.Control/ListLoras": ANY,
    "/vllm.Control/GetKvEventSources": ANY,
    "/vllm.grpc.engine.VllmEngine/Generate": INFERENCE,
    "/vllm.grpc.engine.VllmEngine/Embed": INFERENCE,
    "/vllm.grpc.engine.VllmEngine/HealthCheck": PUBLIC,
    "/vllm.grpc.engine.VllmEngine/Abort": INFERENCE,
    "/vllm.grpc.engine.VllmEngine/GetModelInfo": ANY,
    "/vllm.grpc.engine.VllmEngine/GetServerInfo": ANY,
    "/vllm.grpc.engine.VllmEngine/GetLoads": ADMIN,
    "/openengine.v1.Inference/Generate": INFERENCE,
    "/openengine.v1.Control/GetServerInfo": ANY,
    "/openengine.v1.Control/GetModelInfo": ANY,
    "/openengine.v1.Control/GetLoad": ADMIN,
    "/openengine.v1.Control/Health": ANY,
    "/openengine.v1.Control/Abort": INFERENCE,
    "/openengine.v1.Control/LoadLora": ADMIN,
    "/openengine.v1.Control/UnloadLora": ADMIN,
    "/openengine.v1.Control/ListLoras": ANY,
    "/openengine.v1.Control/GetKvEventSources": ANY,
    "/grpc.health.v1.Health/Check": PUBLIC,
    "/grpc.health.v1.Health/List": PUBLIC,
    "/grpc.health.v1.Health/Watch": PUBLIC,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": ANY,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": ANY,
}


def is_public(method: str) -> bool:
    """Whether the method gives every caller the same answer, and so needs no credentials."""
    rule = RULES.get(method)
    return rule is not None and rule.role is None


def check_role(principal: Principal, method: str) -> None:
    """Raise PermissionDenied if the caller may not call this method at all."""
    rule = RULES.get(method)
    if rule is None:
        raise PermissionDenied(f"this server lets no caller use {method}")
    if rule.role is None or any(role is not None and principal.has(role) for role in (rule.role, rule.or_role)):
        return
    raise PermissionDenied(f"{method} needs the role {rule.role.value!r}, which {principal.name!r} does not have")


def check_resource(principal: Principal, method: str, request: Any) -> None:
    """Raise PermissionDenied if the request names a resource of another tenant, whether it exists or not."""
    rule = RULES[method]
    if not rule.resource or principal.has(Role.ADMIN):
        return
    name = request
    for field in rule.resource.split("."):
        name = getattr(name, field)
    if not name and rule.own_if_absent:
        return
    tenant = _tenant_of(name)
    if rule.reads and tenant == "-":
        return  # all that the caller may see: the method itself selects
    if tenant != principal.tenant and not (rule.reads and tenant == SHARED_TENANT):
        raise PermissionDenied(
            f"{principal.name!r} acts for tenant {principal.tenant!r} alone, and {rule.resource} is {name[:200]!r}"
        )


def _tenant_of(name: str) -> str | None:
    """The tenant in tenants/{tenant} or tenants/{tenant}/…; None in other names."""
    parts = name.split("/")
    return parts[1] if len(parts) >= 2 and parts[0] == "tenants" else None
