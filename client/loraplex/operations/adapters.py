"""The admin port: adapters."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

from google.protobuf.field_mask_pb2 import FieldMask

from loraplex.channel import CallOptions, call_options
from loraplex.operations.base import (
    Listing,
    Operation,
    StreamOperation,
    Upload,
    adapter_name,
    model_name,
    new_id,
    optional_duration,
    tenant_name,
)
from loraplex.v1 import adapters_pb2, generation_pb2

FILES = ("adapter_config.json", "adapter_model.safetensors")
# Sent too if they are there: the signature, and how its text is tokenised.
MORE_FILES = (
    "adapter.sig",
    "added_tokens.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
CHUNK_BYTES = 1024 * 1024
Residency: TypeAlias = adapters_pb2.AdapterResidency.ValueType | str  # or "disk", "host", "device"


class RegisterOptions(TypedDict, total=False):
    """Options of a new adapter version."""

    digest: str | None
    """Digest that the files must have, "sha256:" and 64 hex digits. None: any."""
    labels: Mapping[str, str] | None
    """Labels for the operator's own use. None: no labels."""
    pinned: bool | None
    """Whether the version must stay on the device. None: no."""
    make_current: bool | None
    """Whether the bare name moves to the version as soon as it can be used. None: yes."""
    residency: Residency | None
    """How close to the device to bring the version: "disk", "host" or "device". None: host."""
    wait: float | None
    """Seconds to wait at most until the version is there or has failed. None: return at once."""
    validate_only: bool | None
    """Whether to read and check the files and register nothing. None: no."""
    default_constraint: generation_pb2.Constraint | None
    """Form of the outputs of requests that set none: see `loraplex.constraint`. None: any."""
    request_id: str | None
    """UUID by which the server knows a repeated call again. None: a new one."""


class RegisterArguments(RegisterOptions, CallOptions, total=False):
    """Options of a new adapter version, and of the call."""


def get_adapter(name: str, *, tenant: str = "shared", **call: Unpack[CallOptions]) -> Operation[adapters_pb2.Adapter]:
    """Return one version of an adapter as it is now: the current one for a name without @{version}.

    Args:
        name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
        tenant: Id of the tenant that has it, unless `name` is a full name.
    """
    request = adapters_pb2.GetAdapterRequest(name=adapter_name(name, tenant))
    return Operation("/loraplex.v1.AdapterService/GetAdapter", request, adapters_pb2.Adapter, call)


def list_adapters(
    *,
    tenant: str = "-",
    base_model: str | None = None,
    include_versions: bool = False,
    **call: Unpack[CallOptions],
) -> Listing[adapters_pb2.Adapter]:
    """Return the adapters of a tenant, ordered by name.

    Args:
        tenant: Id of the tenant. "-": all tenants that the caller may see.
        base_model: Only adapters of this model. None: of all models.
        include_versions: Whether to return every version, instead of only the current one of each adapter.
    """

    def page(token: str) -> Operation[adapters_pb2.ListAdaptersResponse]:
        request = adapters_pb2.ListAdaptersRequest(
            parent=tenant_name(tenant),
            base_model=None if base_model is None else model_name(base_model),
            include_versions=include_versions,
            page_token=token,
        )
        return Operation("/loraplex.v1.AdapterService/ListAdapters", request, adapters_pb2.ListAdaptersResponse, call)

    return Listing(page, lambda response: response.adapters)


def create_adapter(
    adapter_id: str,
    *,
    base_model: str,
    source: str,
    tenant: str = "shared",
    **options: Unpack[RegisterArguments],
) -> Operation[adapters_pb2.Adapter]:
    """Register a version from files that the server can reach, and return it.

    Args:
        adapter_id: Id of the adapter.
        base_model: Model that the adapter is for.
        source: Directory under one of the server's roots, or s3://{bucket}/{prefix} or hf://{owner}/{name}@{commit}.
        tenant: Id of the tenant that shall have the adapter.
    """
    request = _registration(adapter_id, base_model, tenant, options)
    request.adapter.source = source
    return Operation("/loraplex.v1.AdapterService/CreateAdapter", request, adapters_pb2.Adapter, call_options(options))


def upload_adapter(
    adapter_id: str,
    *,
    base_model: str,
    directory: str | Path,
    tenant: str = "shared",
    **options: Unpack[RegisterArguments],
) -> Upload[adapters_pb2.Adapter]:
    """Register a version from files in a local directory, which are sent to the server, and return it.

    Raises FileNotFoundError, before anything is sent, if adapter_config.json or adapter_model.safetensors is not
    there.

    Args:
        adapter_id: Id of the adapter.
        base_model: Model that the adapter is for.
        directory: Directory with the adapter's files.
        tenant: Id of the tenant that shall have the adapter.
    """
    files = [Path(directory) / name for name in FILES]
    files += [file for name in MORE_FILES if (file := Path(directory) / name).exists()]
    sizes = [file.stat().st_size for file in files]
    header = _registration(adapter_id, base_model, tenant, options)

    def requests() -> Iterator[adapters_pb2.UploadAdapterRequest]:
        yield adapters_pb2.UploadAdapterRequest(header=header)
        for file, size in zip(files, sizes, strict=True):
            yield adapters_pb2.UploadAdapterRequest(file=adapters_pb2.UploadFile(name=file.name, size_bytes=size))
            with file.open("rb") as content:
                while chunk := content.read(CHUNK_BYTES):
                    yield adapters_pb2.UploadAdapterRequest(chunk=chunk)

    return Upload("/loraplex.v1.AdapterService/UploadAdapter", requests(), adapters_pb2.Adapter, call_options(options))


def update_adapter(
    name: str,
    *,
    tenant: str = "shared",
    labels: Mapping[str, str] | None = None,
    pinned: bool | None = None,
    version: str | None = None,
    default_constraint: generation_pb2.Constraint | None = None,
    etag: str = "",
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[adapters_pb2.Adapter]:
    """Change what is given of an adapter, and return it as it is then. Raises ValueError if nothing is given.

    Args:
        name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
        tenant: Id of the tenant that has it, unless `name` is a full name.
        labels: Labels that replace all others. None: unchanged.
        pinned: Whether the version must stay on the device. None: unchanged.
        version: Version that the bare name shall mean, such as "legal@1a2b3c4d5e6f". None: unchanged.
        default_constraint: Form of the outputs of requests that set none: see `loraplex.constraint`. An empty one
            removes it. None: unchanged.
        etag: Change only if this is still its etag. "": change in any case.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
    changes: dict[str, Any] = {"labels": labels, "pinned": pinned}
    changes["version"] = None if version is None else adapter_name(version, tenant)
    changes["default_constraint"] = default_constraint
    changes = {field: value for field, value in changes.items() if value is not None}
    if not changes:
        raise ValueError("nothing to change: pass labels=, pinned=, version= or default_constraint=")
    adapter = adapters_pb2.Adapter(name=adapter_name(name, tenant), etag=etag, **changes)
    if not adapter.default_constraint.WhichOneof("kind"):
        adapter.ClearField("default_constraint")
    request = adapters_pb2.UpdateAdapterRequest(
        adapter=adapter,
        update_mask=FieldMask(paths=list(changes)),
        request_id=request_id or new_id(),
    )
    return Operation("/loraplex.v1.AdapterService/UpdateAdapter", request, adapters_pb2.Adapter, call)


def delete_adapter(
    name: str,
    *,
    tenant: str = "shared",
    etag: str | None = None,
    wait: float | None = None,
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[adapters_pb2.Adapter]:
    """Start to delete a version, or all versions for a bare name. Running requests end first.

    Args:
        name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
        tenant: Id of the tenant that has it, unless `name` is a full name.
        etag: Delete only if this is still its etag. None: delete in any case.
        wait: Seconds to wait at most until it is gone. None: return at once.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
    request = adapters_pb2.DeleteAdapterRequest(
        name=adapter_name(name, tenant), etag=etag, wait=optional_duration(wait), request_id=request_id or new_id()
    )
    return Operation("/loraplex.v1.AdapterService/DeleteAdapter", request, adapters_pb2.Adapter, call)


def load_adapter(
    name: str,
    *,
    tenant: str = "shared",
    residency: Residency | None = None,
    wait: float | None = None,
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[adapters_pb2.Adapter]:
    """Bring a version closer to the device, ahead of its first request.

    Args:
        name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
        tenant: Id of the tenant that has it, unless `name` is a full name.
        residency: How close to the device: "host" or "device". None: device.
        wait: Seconds to wait at most until it is there or has failed. None: return at once.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
    request = adapters_pb2.LoadAdapterRequest(
        name=adapter_name(name, tenant),
        residency=residency_value(residency),
        wait=optional_duration(wait),
        request_id=request_id or new_id(),
    )
    return Operation("/loraplex.v1.AdapterService/LoadAdapter", request, adapters_pb2.Adapter, call)


def unload_adapter(
    name: str,
    *,
    tenant: str = "shared",
    residency: Residency | None = None,
    wait: float | None = None,
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[adapters_pb2.Adapter]:
    """Free the memory of a version, once no request uses it.

    Args:
        name: Id of the adapter or its full name, tenants/{tenant}/adapters/{adapter}, with or without @{version}.
        tenant: Id of the tenant that has it, unless `name` is a full name.
        residency: How far from the device: "disk" or "host". None: disk.
        wait: Seconds to wait at most until its memory is free. None: return at once.
        request_id: UUID by which the server knows a repeated call again. None: a new one.
    """
    request = adapters_pb2.UnloadAdapterRequest(
        name=adapter_name(name, tenant),
        residency=residency_value(residency),
        wait=optional_duration(wait),
        request_id=request_id or new_id(),
    )
    return Operation("/loraplex.v1.AdapterService/UnloadAdapter", request, adapters_pb2.Adapter, call)


def watch_adapters(
    *, tenant: str = "-", base_model: str | None = None, **call: Unpack[CallOptions]
) -> StreamOperation[adapters_pb2.WatchAdaptersResponse]:
    """Receive all versions, and then every change.

    Args:
        tenant: Id of the tenant. "-": all tenants that the caller may see.
        base_model: Only adapters of this model. None: of all models.
    """
    request = adapters_pb2.WatchAdaptersRequest(
        parent=tenant_name(tenant), base_model=None if base_model is None else model_name(base_model)
    )
    return StreamOperation(
        "/loraplex.v1.AdapterService/WatchAdapters", request, adapters_pb2.WatchAdaptersResponse, call
    )


def _registration(
    adapter_id: str, base_model: str, tenant: str, options: RegisterOptions
) -> adapters_pb2.CreateAdapterRequest:
    return adapters_pb2.CreateAdapterRequest(
        parent=tenant_name(tenant),
        adapter_id=adapter_id,
        adapter=adapters_pb2.Adapter(
            base_model=model_name(base_model),
            digest=options.get("digest") or "",
            labels=options.get("labels") or {},
            pinned=options.get("pinned") or False,
            default_constraint=options.get("default_constraint"),
        ),
        make_current=options.get("make_current"),
        residency=residency_value(options.get("residency")),
        wait=optional_duration(options.get("wait")),
        validate_only=options.get("validate_only") or False,
        request_id=options.get("request_id") or new_id(),
    )


def residency_value(residency: Residency | None) -> adapters_pb2.AdapterResidency.ValueType:
    if residency is None:
        return adapters_pb2.ADAPTER_RESIDENCY_UNSPECIFIED
    if isinstance(residency, str):
        return adapters_pb2.AdapterResidency.Value(f"ADAPTER_RESIDENCY_{residency.upper()}")
    return residency
