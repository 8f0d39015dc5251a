"""The admin port: adapters."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias, Unpack

from google.protobuf.field_mask_pb2 import FieldMask

from loraplex.channel import CallOptions, call_options
from loraplex.operations.base import (
    Listing,
    Operation,
    Upload,
    adapter_name,
    model_name,
    new_id,
    optional_duration,
    tenant_name,
)
from loraplex.v1 import adapters_pb2

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


class RegisterOptions(CallOptions, total=False):
    """What a new adapter version can be told."""

    digest: str | None  # the files must have this digest
    labels: Mapping[str, str] | None
    pinned: bool | None  # keep it on the device
    make_current: bool | None  # move the bare name to it once it can be used; absent: yes
    residency: Residency | None  # how close to the device to bring it
    wait: float | None  # return when it is there or has failed, or after this time
    validate_only: bool  # read and check, register nothing
    request_id: str | None  # a UUID for idempotence; absent: a new one


def get_adapter(name: str, *, tenant: str = "shared", **call: Unpack[CallOptions]) -> Operation[adapters_pb2.Adapter]:
    """One version of an adapter as it is now: the current one for a name without @version."""
    request = adapters_pb2.GetAdapterRequest(name=adapter_name(name, tenant))
    return Operation("/loraplex.v1.AdapterService/GetAdapter", request, adapters_pb2.Adapter, call)


def list_adapters(
    *,
    tenant: str = "-",
    base_model: str | None = None,
    include_versions: bool = False,
    **call: Unpack[CallOptions],
) -> Listing[adapters_pb2.Adapter]:
    """The adapters of a tenant, or of all that the caller may see; only the current versions unless told otherwise."""

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
    **options: Unpack[RegisterOptions],
) -> Operation[adapters_pb2.Adapter]:
    """Register a version from files that the server can reach."""
    request = _registration(adapter_id, base_model, tenant, options)
    request.adapter.source = source
    return Operation("/loraplex.v1.AdapterService/CreateAdapter", request, adapters_pb2.Adapter, call_options(options))


def upload_adapter(
    adapter_id: str,
    *,
    base_model: str,
    directory: str | Path,
    tenant: str = "shared",
    **options: Unpack[RegisterOptions],
) -> Upload[adapters_pb2.Adapter]:
    """Register a version from files in a local directory, which are sent to the server.

    Raises FileNotFoundError, before anything is sent, if one of the two files is not there.
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
    etag: str = "",
    request_id: str | None = None,
    **call: Unpack[CallOptions],
) -> Operation[adapters_pb2.Adapter]:
    """Change what is given: labels, pinning, or the version that the bare name means ("legal@1a2b3c4d5e6f")."""
    changes: dict[str, Any] = {"labels": labels, "pinned": pinned}
    changes["version"] = None if version is None else adapter_name(version, tenant)
    changes = {field: value for field, value in changes.items() if value is not None}
    if not changes:
        raise ValueError("nothing to change: pass labels=, pinned= or version=")
    request = adapters_pb2.UpdateAdapterRequest(
        adapter=adapters_pb2.Adapter(name=adapter_name(name, tenant), etag=etag, **changes),
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
    """Delete a version, or for a bare name all versions, once running requests have ended."""
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
    """Bring a version closer to the device; with `wait`, return when it is there or has failed, or after that time."""
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
    """Free the memory of a version, once no request uses it; with `wait`, return when done or after that time."""
    request = adapters_pb2.UnloadAdapterRequest(
        name=adapter_name(name, tenant),
        residency=residency_value(residency),
        wait=optional_duration(wait),
        request_id=request_id or new_id(),
    )
    return Operation("/loraplex.v1.AdapterService/UnloadAdapter", request, adapters_pb2.Adapter, call)


def watch_adapters(
    *, tenant: str = "-", base_model: str | None = None, **call: Unpack[CallOptions]
) -> Operation[adapters_pb2.WatchAdaptersResponse]:
    """All versions, then every change."""
    request = adapters_pb2.WatchAdaptersRequest(
        parent=tenant_name(tenant), base_model=None if base_model is None else model_name(base_model)
    )
    return Operation("/loraplex.v1.AdapterService/WatchAdapters", request, adapters_pb2.WatchAdaptersResponse, call)


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
        ),
        make_current=options.get("make_current"),
        residency=residency_value(options.get("residency")),
        wait=optional_duration(options.get("wait")),
        validate_only=options.get("validate_only", False),
        request_id=options.get("request_id") or new_id(),
    )


def residency_value(residency: Residency | None) -> adapters_pb2.AdapterResidency.ValueType:
    if residency is None:
        return adapters_pb2.ADAPTER_RESIDENCY_UNSPECIFIED
    if isinstance(residency, str):
        return adapters_pb2.AdapterResidency.Value(f"ADAPTER_RESIDENCY_{residency.upper()}")
    return residency
