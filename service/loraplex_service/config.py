"""The configuration: a YAML file, then LORAPLEX_* of the environment over it. Read once, checked as a whole, frozen.

Relative paths are relative to the directory of the file. Every scalar at the top level of the file can be overridden by
the environment: LORAPLEX_LISTEN, LORAPLEX_LOG_LEVEL, LORAPLEX_DRAIN_GRACE_SECONDS and so on. Other variables that begin
with LORAPLEX_ are passed over, because Kubernetes sets some for every service of that name.
"""

import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Self

import msgspec

from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_engine.link.logs import LOG_FORMATS
from loraplex_service.adapters.config import AdapterConfig, ConstraintConfig
from loraplex_service.admission.tenants import TenantConfig
from loraplex_service.auth.config import AuthConfig
from loraplex_service.config_checks import Shape, number_problems
from loraplex_service.config_file import ConfigError, read_yaml
from loraplex_service.models.config import HostedModelConfig, SupervisionConfig, is_model
from loraplex_service.models.devices import ROUNDING
from loraplex_service.models.machines import machines_problems
from loraplex_service.ports.config import DIALECTS, TlsConfig
from loraplex_service.requests.forms import checked_grammar
from loraplex_service.telemetry.config import OtlpConfig, UsageConfig

ENVIRONMENT_PREFIX = "LORAPLEX_"
STATE_DIRECTORY = ".loraplex"
LOOPBACK_HOSTS = frozenset(("127.0.0.1", "[::1]", "localhost"))


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the parts of the file: a key that does not exist is an error."""


class LimitsConfig(_Section, frozen=True):
    """Limits on requests in flight, on message sizes, and on waiting times."""

    in_flight_sequences: float = 4.0  # times max_num_seqs; beyond it requests are refused as OVERLOADED
    in_flight_cache_tokens: float = 4.0  # times the tokens that the key-value cache holds
    expected_output_tokens: int = 512  # an output counts as at most so many tokens
    unread_tokens: int = 8192  # unread tokens of one stream; beyond it the stream is cut
    unread_seconds: float = 30.0  # for which a message of a stream may stay unread
    unread_bytes: int = 256 << 20  # unread answers to unary calls, of one tenant
    answer_bytes: int = 32 << 20  # one answer to a unary call
    request_bytes: int = 4 << 20  # a request of the data port, decompressed
    batch_bytes: int = 8 << 20  # a BatchGenerate request, decompressed
    message_seconds: float = 30.0  # to wait for a call's next message
    calls_per_tenant: int = 2048  # calls in progress on one port
    calls_per_connection: int = 64  # calls in progress; one that waits for its turn takes 16 KiB
    connections: int = 1024  # to one port
    idle_connection_seconds: float = 300.0  # without a call
    adapter_load_wait_seconds: float = 60.0  # the longest wait of a request for its adapter
    template_workers: int = 2  # processes that render chat templates
    waiting_text_bytes: int = 32 << 20  # long texts in work or waiting; beyond it requests are refused as OVERLOADED
    upload_bytes: int = 2 << 30  # all files of one uploaded or fetched adapter


class ServiceConfig(_Section, frozen=True):
    """The whole file."""

    models: tuple[HostedModelConfig, ...]
    adapters: tuple[AdapterConfig, ...] = ()
    adapter_roots: tuple[str, ...] = ()  # adapters are read only from below these directories
    adapter_sources: tuple[str, ...] = ()  # and fetched only from these prefixes: "s3://bucket/prefix/", "hf://owner/"
    object_store: dict[str, str] = {}  # for s3://: endpoint, region, …
    state_directory: str | None = None  # state that survives restarts; "": none is kept. Default in a file: beside it
    state: str | None = None  # postgresql://…: the database of a fleet's state; None: this server has its own
    fleet_listen: str | None = None  # where the other replicas of the fleet may fetch adapters' files from this one
    fleet_address: str | None = None  # what they call that; None: as fleet_listen has it
    fleet_server_name: str | None = None  # which replicas' certificates are for; None: the hosts of their addresses
    fleet_ca: str | None = None  # PEM: who signed those; None: tls.client_ca, or whom the system trusts
    machines_listen: str | None = None  # where the other machines of a model come: those that `machines` counts
    machines_secret: str | None = None  # the file with what they know each other by
    listen: str = "127.0.0.1:50051"  # the data port; port 0 takes a free one
    admin_listen: str = "127.0.0.1:50052"
    health_listen: str | None = (
        None  # a plaintext port for an orchestrator's probes: see service/loraplex_service/ports/probes.py
    )
    metrics_listen: str | None = (
        None  # the Prometheus page, in plaintext: see service/loraplex_service/control/metrics_page.py
    )
    dialects: tuple[str, ...] = ()  # spoken on the data port beside the contract: see service/loraplex_service/dialects
    http_listen: str | None = (
        None  # OpenAI's and Anthropic's APIs over HTTP, from a process of its own: see service/loraplex_service/http
    )
    http_admin: bool = False  # whether adapters may be loaded and unloaded over HTTP, by who may over gRPC
    http_hosts: tuple[str, ...] = ()  # names by which it is called where it asks for no credentials, beside its address
    tls: TlsConfig | None = None
    insecure: bool = False  # allow other addresses than loopback without TLS and without credentials
    auth: AuthConfig | None = None  # None: every caller that reaches a listener may call
    tenants: dict[str, TenantConfig] = {}
    other_tenants: TenantConfig = TenantConfig()  # tenants that `tenants` does not name
    drain_grace_seconds: float = 30.0  # for running requests to end, once told to stop
    lame_duck_seconds: float = 0.0  # before that: still serving, but reporting NOT_SERVING to balancers
    log_level: str = "INFO"
    log_format: str = "text"  # or "json": one object a line
    access_log: bool = False  # a line for each call
    usage: UsageConfig | None = None
    otlp: OtlpConfig | None = None
    limits: LimitsConfig = LimitsConfig()
    supervision: SupervisionConfig = SupervisionConfig()

    def with_free_ports(self) -> Self:
        """Return a copy that listens on free loopback ports, whatever the file says."""
        return msgspec.structs.replace(self, listen="127.0.0.1:0", admin_listen="127.0.0.1:0")


def default_config_file() -> Path:
    """The path of the embedded configuration, with models and adapters small enough for any machine."""
    return Path(str(resources.files("loraplex_demo"))) / "loraplex.yaml"


def load_config(file: Path | None, environment: Mapping[str, str]) -> ServiceConfig:
    """Read a file (None: the embedded default) and the environment. Raises ConfigError naming everything at fault."""
    file = (default_config_file() if file is None else file).absolute()
    fields, problems = read_yaml(file)
    return _checked(fields, problems, str(file), file.parent.resolve(), environment)


def make_config(fields: Mapping[str, Any], environment: Mapping[str, str]) -> ServiceConfig:
    """Take what a file would have, and the environment. Paths are relative to the working directory, and no state is
    kept unless a directory for it is named. Raises ConfigError.
    """
    return _checked({"state_directory": ""} | dict(fields), [], "the command line", Path.cwd(), environment)


def _checked(
    fields: dict[str, Any], problems: list[str], source: str, base: Path, environment: Mapping[str, str]
) -> ServiceConfig:
    """source: where the fields stand, for people; problems: what is known to be wrong there."""
    overrides, more_problems = _overrides(environment)
    shape = Shape(ServiceConfig)
    fields = shape.pruned(fields | overrides, ServiceConfig)
    problems += more_problems + shape.mistakes
    try:
        config = msgspec.convert(fields, ServiceConfig)
    except msgspec.ValidationError as error:  # it is one of the mistakes
        raise ConfigError(f"{source}: " + "; ".join(problems)) from error
    config = _with_absolute_paths(config, base)
    problems += _problems(config)
    if problems:
        raise ConfigError(f"{source}: " + "; ".join(problems))
    return config


# ---- reading ---------------------------------------------------------------------------------------------------------


def _overrides(environment: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Return the settings in the environment, and what is wrong with them."""
    overrides: dict[str, Any] = {}
    problems: list[str] = []
    for field in msgspec.structs.fields(ServiceConfig):
        variable = ENVIRONMENT_PREFIX + field.name.upper()
        if field.type not in (str, bool, int, float, str | None) or variable not in environment:
            continue
        try:
            overrides[field.name] = msgspec.convert(environment[variable], field.type, strict=False)
        except msgspec.ValidationError as error:
            problems.append(f"{variable}={environment[variable]!r} in the environment: {error}")
    return overrides, problems


# ---- checking --------------------------------------------------------------------------------------------------------


def _with_absolute_paths(config: ServiceConfig, base: Path) -> ServiceConfig:
    def absolute(path: str) -> str:
        return str(base / Path(path).expanduser())

    def located(model: str) -> str:
        is_path = model.startswith((".", "/", "~")) or is_model(base / model)  # else an id of a hub
        return absolute(model) if is_path else model

    def model(item: HostedModelConfig) -> HostedModelConfig:
        drafts = item.drafts
        if drafts is not None and drafts.model is not None:
            drafts = msgspec.structs.replace(drafts, model=located(drafts.model))
        return msgspec.structs.replace(
            item,
            model=located(item.model),
            drafts=drafts,
            chat_template=None if item.chat_template is None else absolute(item.chat_template),
            disk_cache_directory=None if item.disk_cache_directory is None else absolute(item.disk_cache_directory),
        )

    def tenant(item: TenantConfig) -> TenantConfig:
        return msgspec.structs.replace(item, adapter_keys=tuple(absolute(file) for file in item.adapter_keys))

    def adapter_source(source: str) -> str:
        """Find an adapter's directory under the first root that has it, as for any request, else beside the file."""
        under = [os.path.join(absolute(root), source) for root in config.adapter_roots]
        return next(filter(os.path.isdir, under), absolute(source))

    tls = config.tls
    if tls is not None:
        client_ca = None if tls.client_ca is None else absolute(tls.client_ca)
        tls = TlsConfig(certificate=absolute(tls.certificate), key=absolute(tls.key), client_ca=client_ca)
    usage = config.usage
    if usage is not None:
        usage = msgspec.structs.replace(usage, file=absolute(usage.file))
    return msgspec.structs.replace(
        config,
        models=tuple(model(item) for item in config.models),
        adapters=tuple(
            item if item.is_remote else msgspec.structs.replace(item, source=adapter_source(item.source))
            for item in config.adapters
        ),
        tenants={name: tenant(item) for name, item in config.tenants.items()},
        other_tenants=tenant(config.other_tenants),
        adapter_roots=tuple(absolute(root) for root in config.adapter_roots),
        state_directory=_state_directory(config, base),
        tls=tls,
        fleet_ca=None if config.fleet_ca is None else absolute(config.fleet_ca),
        machines_secret=None if config.machines_secret is None else absolute(config.machines_secret),
        usage=usage,
        auth=None if config.auth is None else config.auth.with_paths(absolute),
    )


def _state_directory(config: ServiceConfig, base: Path) -> str:
    if config.state_directory == "":
        return ""
    return str(base / Path(config.state_directory or STATE_DIRECTORY).expanduser())


def _problems(config: ServiceConfig) -> Iterator[str]:
    if not config.models:
        yield "models: there is none; name at least one"
    yield from _repeated("models", [model.name for model in config.models])
    yield from _repeated("adapters", [f"{adapter.tenant}/{adapter.adapter_id}" for adapter in config.adapters])
    for index, model in enumerate(config.models):
        yield from (f"models[{index}] {model.name!r}: {problem}" for problem in model.problems())
    yield from _fraction_problems(config.models)
    yield from machines_problems(config.models, config.machines_listen, config.machines_secret, config.insecure)
    names = {model.name for model in config.models}
    for index, adapter in enumerate(config.adapters):
        place = f"adapters[{index}] {adapter.name!r}"
        if not (is_id(adapter.tenant) and is_id(adapter.adapter_id)):
            yield f"{place}: the name must be an id, or two with a slash between, each {ID_RULE}"
        if adapter.model not in names:
            yield f"{place}: model {adapter.model!r} is none of those configured: {', '.join(sorted(names))}"
        if not config.adapter_roots and not adapter.is_remote:
            yield f"{place}: adapter_roots is empty, so no adapter may be read; list the directory that it lies in"
        if adapter.default_constraint is not None:
            yield from (f"{place}: default_constraint: {each}" for each in _form_problems(adapter.default_constraint))
    for root in config.adapter_roots:
        if not Path(root).is_dir():
            yield f"adapter_roots: there is no directory {root}"
    for name, tenant in config.tenants.items():
        if not is_id(name):
            yield f"tenants: {name!r} is not a name of a tenant: {ID_RULE}"
        yield from (f"tenants.{name}: {problem}" for problem in tenant.problems())
    yield from (f"other_tenants: {problem}" for problem in config.other_tenants.problems())
    yield from _listener_problems(config)
    yield from _repeated("dialects", list(config.dialects))
    for name in sorted(set(config.dialects) - set(DIALECTS)):
        yield f"dialects: {name!r} is not one of {', '.join(DIALECTS)}"
    yield from _fleet_problems(config)
    if config.auth is not None:
        yield from (f"auth: {problem}" for problem in config.auth.problems())
        if config.auth.certificates and (config.tls is None or config.tls.client_ca is None):
            yield "auth: certificates: no caller is asked for a certificate; set tls.client_ca"
    if config.log_level.upper() not in logging.getLevelNamesMapping():
        yield f"log_level {config.log_level!r} is not one of DEBUG, INFO, WARNING, ERROR"
    if config.log_format not in LOG_FORMATS:
        yield f"log_format {config.log_format!r} is not one of {', '.join(LOG_FORMATS)}"
    if config.usage is not None:
        yield from (f"usage: {problem}" for problem in config.usage.problems())
    if config.otlp is not None:
        yield from (f"otlp: {problem}" for problem in config.otlp.problems())
    for name in _COUNTS_OF_GRPC:
        if not 1 <= getattr(config.limits, name) <= _MOST_OF_GRPC:
            yield f"limits: {name} {getattr(config.limits, name)} must be from 1 to {_MOST_OF_GRPC}"
    if config.limits.template_workers < 1:
        yield f"limits: template_workers {config.limits.template_workers} must be at least 1"
    yield from number_problems(config)


def _fraction_problems(models: Sequence[HostedModelConfig]) -> Iterator[str]:
    """Problems with GPUs whose models, as they name them, would take more than the whole memory."""
    by_gpu: dict[str, dict[str, float]] = {}
    for model in models:
        if model.device.startswith("cuda:") and model.device_memory_fraction is not None:
            by_gpu.setdefault(model.device, {})[model.name] = model.device_memory_fraction
    for gpu, named in by_gpu.items():
        total = sum(named.values())
        if total > 1 + ROUNDING:
            yield (
                f"device_memory_fraction: {', '.join(f'{name!r} {share:g}' for name, share in named.items())} are on "
                f"{gpu}, and {total:g} together: make it at most 1"
            )


def _fleet_problems(config: ServiceConfig) -> Iterator[str]:
    """Nothing of the connection string is shown: it may have a password."""
    if config.state is None:
        for key in ("fleet_listen", "fleet_address", "fleet_server_name", "fleet_ca"):
            if getattr(config, key) is not None:
                yield f"{key}: there is no fleet; set state to its database, postgresql://…, or leave this out"
        return
    if not config.state.startswith(("postgresql://", "postgres://")):
        yield "state: postgresql://USER@HOST/DATABASE is expected; for a state of the server's own, leave it out"
    if importlib.util.find_spec("psycopg") is None:
        yield "state: psycopg is not installed; install loraplex-server[postgresql]"
    if config.fleet_address is not None and config.fleet_listen is None:
        yield "fleet_address: there is no fleet_listen, which it would be the address of; set that, too"
    for key in ("fleet_server_name", "fleet_ca"):
        if getattr(config, key) is not None and config.tls is None:
            yield f"{key}: replicas have no certificates without tls; set that, too, or leave this out"


def _form_problems(constraint: ConstraintConfig) -> Iterator[str]:
    if len(constraint.kinds) != 1:
        yield f"give one of {', '.join(constraint.__struct_fields__)}"
        return
    try:
        checked_grammar(constraint.message())
    except ValueError as error:
        yield f"{constraint.kinds[0]}: cannot be used: {error}"


_COUNTS_OF_GRPC = (
    "connections",
    "calls_per_connection",
    "calls_per_tenant",
    "request_bytes",
    "batch_bytes",
    "answer_bytes",
)
_MOST_OF_GRPC = 1 << 30  # its options are of 32 bits


def _repeated(key: str, names: list[str]) -> Iterator[str]:
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{key}: {name!r} appears {names.count(name)} times; names must differ"


def _listener_problems(config: ServiceConfig) -> Iterator[str]:
    if config.http_admin and config.http_listen is None:
        yield "http_admin: there is no http_listen, at which adapters could be managed; set it, or leave this out"
    for key in ("listen", "admin_listen", "health_listen", "metrics_listen", "http_listen", "fleet_listen"):
        address: str | None = getattr(config, key)
        if address is None:
            continue
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            yield f"{key} {address!r}: host:port is expected, such as 127.0.0.1:50051; port 0 takes a free one"
        elif key == "health_listen":
            continue  # it says SERVING or NOT_SERVING, and nothing that needs protection
        elif key == "fleet_listen":
            if config.tls is None and host not in LOOPBACK_HOSTS and not config.insecure:
                yield (
                    f"{key} {address!r} can be reached from other machines: set tls, since anybody on the way could "
                    "read the adapters; or insecure: true where the network is trusted"
                )
        elif key == "metrics_listen" and host not in LOOPBACK_HOSTS and not config.insecure:
            yield (
                f"{key} {address!r} can be reached from other machines, and anybody there could read the usage of "
                "all tenants: set insecure: true where the network is trusted"
            )
        elif host not in LOOPBACK_HOSTS and not config.insecure:
            missing = []
            if config.tls is None:
                missing.append("tls, since anybody on the way could read it")
            if config.auth is None and (config.tls is None or config.tls.client_ca is None):
                missing.append("auth (or tls.client_ca), since anybody there could use it")
            if missing:
                yield (
                    f"{key} {address!r} can be reached from other machines: set {' and '.join(missing)}; or insecure: "
                    "true where the network is trusted"
                )
