"""Versions of adapters as resources, each with what its caller may see of it."""

from loraplex.v1.adapters_pb2 import (
    ADAPTER_RESIDENCY_DEVICE,
    ADAPTER_RESIDENCY_DISK,
    ADAPTER_RESIDENCY_HOST,
    Adapter,
    AdapterResidency,
    WatchAdaptersResponse,
)
from loraplex.v1.generation_pb2 import Constraint
from loraplex.v1.watch_pb2 import WATCH_EVENT_TYPE_CHANGED, WATCH_EVENT_TYPE_DELETED
from loraplex_adapters.key import AdapterKey
from loraplex_adapters.records import AdapterChange, ChangeKind
from loraplex_adapters.residency import Residency
from loraplex_adapters.versions import (
    VERSION_DIGITS,
    AdapterInfo,
    AdapterSpec,
    AdapterState,
    AdapterVersion,
    resource_name,
)
from loraplex_service.call import sees_inside
from loraplex_service.errors import FailedPrecondition, to_status
from loraplex_service.models.host import ModelHost
from loraplex_service.models.supervisor import EngineState
from loraplex_service.timestamps import timestamp

STATES = {
    AdapterState.LOADING: Adapter.STATE_LOADING,
    AdapterState.ACTIVE: Adapter.STATE_ACTIVE,
    AdapterState.FAILED: Adapter.STATE_FAILED,
    AdapterState.DELETING: Adapter.STATE_DELETING,
}
RESIDENCIES = {
    Residency.DISK: ADAPTER_RESIDENCY_DISK,
    Residency.HOST: ADAPTER_RESIDENCY_HOST,
    Residency.DEVICE: ADAPTER_RESIDENCY_DEVICE,
}


class AdapterMessages:
    """Makes the messages, with the state that the models' engines report."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host

    def of(self, version: AdapterVersion) -> Adapter:
        """The version as a resource, without what the present caller may not see."""
        message = Adapter(
            name=version.name,
            version=_shown_version(version),
            base_model=f"models/{version.spec.base_model}" if version.spec.base_model else "",
            digest="" if version.is_missing else f"sha256:{version.key.digest}",
            state=STATES[version.state],
            current=version.current,
            pinned=version.spec.pinned,
            create_time=timestamp(version.create_time),
            update_time=timestamp(version.update_time),
            labels=version.spec.labels,
            etag=version.etag,
            default_constraint=constraint_of(version.spec),
        )
        inside = sees_inside(owner_of(version))
        if inside:
            self._add_what_is_inside(message, version)
        error = self.stuck(version)
        if version.state is AdapterState.FAILED:
            error = FailedPrecondition(version.reason, "; ".join(version.problems))
        if error is not None:
            shown = error if inside else FailedPrecondition(error.reason, "ask its operator for the reason")
            message.error.CopyFrom(to_status(shown, ""))
        if version.info is not None:
            _add_facts(message, version.info)
        return message

    def of_change(self, change: AdapterChange) -> WatchAdaptersResponse:
        """The message to those who watch."""
        version = change.version
        if change.kind is ChangeKind.REMOVED:
            gone = Adapter(name=version.name, version=_shown_version(version))
            return WatchAdaptersResponse(type=WATCH_EVENT_TYPE_DELETED, adapter=gone)
        return WatchAdaptersResponse(type=WATCH_EVENT_TYPE_CHANGED, adapter=self.of(version))

    def _add_what_is_inside(self, message: Adapter, version: AdapterVersion) -> None:
        """Add the source, the residency and the usage of a version, which other tenants are not shown."""
        message.source = version.spec.source
        message.residency = self._residency(version)
        message.running_requests = version.num_requests - version.num_waiting
        message.waiting_requests = version.num_waiting
        if version.last_use_time is not None:
            message.last_use_time.CopyFrom(timestamp(version.last_use_time))

    def stuck(self, version: AdapterVersion) -> FailedPrecondition | None:
        """The error of a version that stays LOADING because its model could not be loaded; None: all others."""
        model = self._host.find(version.spec.base_model)
        if version.state is not AdapterState.LOADING or model is None or model.state is not EngineState.FAILED:
            return None
        return FailedPrecondition("MODEL_UNLOADED", f"model {model.name!r} could not be loaded: {model.error}")

    def _residency(self, version: AdapterVersion) -> AdapterResidency.ValueType:
        model = self._host.find(version.spec.base_model)
        client = None if model is None else model.client
        residency = Residency.DISK if client is None else client.adapters.tier(version.key)
        return RESIDENCIES[residency]


def validated_adapter(key: AdapterKey, spec: AdapterSpec, info: AdapterInfo) -> Adapter:
    """The resource that a registration would make."""
    name = resource_name(key)
    message = Adapter(
        name=name,
        version=f"{name}@{key.digest[:VERSION_DIGITS]}",
        base_model=f"models/{spec.base_model}",
        source=spec.source,
        digest=f"sha256:{key.digest}",
        labels=spec.labels,
        default_constraint=constraint_of(spec),
    )
    _add_facts(message, info)
    return message


def constraint_of(spec: AdapterSpec) -> Constraint | None:
    """The form of the outputs of requests that set none; None: any."""
    return Constraint.FromString(spec.default_constraint) if spec.default_constraint else None


def _add_facts(message: Adapter, info: AdapterInfo) -> None:
    message.rank = info.rank
    message.module_ranks.update(info.module_ranks)
    message.alpha = info.alpha
    message.target_modules.extend(info.target_modules)
    message.warnings.extend(info.warnings)
    message.size_bytes = info.size_bytes


def owner_of(version: AdapterVersion) -> str:
    """The tenant that an adapter belongs to."""
    return version.key.name.partition("/")[0]


def _shown_version(version: AdapterVersion) -> str:
    return "" if version.is_missing else version.version_name
