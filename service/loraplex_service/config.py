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
from typing import Any, ClassVar, Self

import msgspec
from msgspec.structs import FieldInfo

from loraplex_adapters.grammar import ID_RULE, is_id
from loraplex_engine.link.bounds import choice_problems
from loraplex_engine.link.logs import LOG_FORMATS
from loraplex_service.adapters.config import AdapterConfig, ConstraintConfig
from loraplex_service.admission.tenants import TenantConfig
from loraplex_service.auth.config import AuthConfig
from loraplex_service.config_checks import Shape, number_problems
from loraplex_service.config_file import ConfigError, read_yaml
from loraplex_service.models.config import HostedModelConfig, SupervisionConfig, is_model
from loraplex_service.models.devices import ROUNDING
from loraplex_service.models.machines import machines_problems
from loraplex_service.ports.config import DIALECTS, LimitsConfig, TlsConfig
from loraplex_service.requests.forms import checked_grammar
from loraplex_service.telemetry.config import OtlpConfig, UsageConfig

ENVIRONMENT_PREFIX = "LORAPLEX_"
STATE_DIRECTORY = ".loraplex"
LOOPBACK_HOSTS = frozenset(("127.0.0.1", "[::1]", "localhost"))


class ServiceConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"dialects": DIALECTS, "log_format": LOG_FORMATS}

    models: tuple[HostedModelConfig, ...]  # the base models, at least one
    adapters: tuple[AdapterConfig, ...] = ()  # adapters to register at the start; more come and go through the API
    # adapters are read only from below these directories; links may not lead out of them
    adapter_roots: tuple[str, ...] = ()
    # adapters are fetched only from these prefixes: `s3://bucket/prefix/`, `hf://owner/`
    adapter_sources: tuple[str, ...] = ()
    # for `s3://`: `endpoint`, `region`, …, as obstore's S3Store has them. Keys come from `AWS_ACCESS_KEY_ID` and its
    # like
    object_store: dict[str, str] = {}
    # the state that survives a restart: adapters, versions, routes, pins, uploaded files. One server for each
    # directory. `""`: none is kept. Left out: `.loraplex` beside the file
    state_directory: str | None = None
    # `postgresql://USER@HOST/DATABASE`: the state that the replicas of a fleet share, see docs/fleet.md. Left out:
    # the server's own, in `state_directory`. Needs the extra `postgresql`
    state: str | None = None
    # where the other replicas of the fleet may fetch the files of adapters from this one; port 0 takes a free one. See
    # docs/fleet.md#files
    fleet_listen: str | None = None
    # what other replicas call that, such as `10.0.0.7:50054`. Left out: as `fleet_listen` has it
    fleet_address: str | None = None
    # with `tls`: the name that the replicas' certificates are for. Left out: the host of each `fleet_address`
    fleet_server_name: str | None = None
    # with `tls`: a file in PEM with the authority that signed the replicas' certificates. Left out: `tls.client_ca`,
    # and without that whom the system trusts
    fleet_ca: str | None = None
    # where the other machines of a model come, of which it has several (`machines`): an address of this one that they
    # reach, such as `10.0.0.5:50055`. See docs/scale.md#one-model-over-several-machines
    machines_listen: str | None = None
    machines_secret: str | None = None  # a file with the secret that they know each other by, of at least 32 bytes
    # inference and tokens; port 0 takes a free one, which the first line on stdout reports
    listen: str = "127.0.0.1:50051"
    # models, adapters, routes, server: for callers with the role `admin`; without `auth`, for everybody who can reach
    # it
    admin_listen: str = "127.0.0.1:50052"
    # a plaintext port for the probes of an orchestrator: `startup`, `liveness` and `readiness` of grpc.health.v1, and
    # nothing else
    health_listen: str | None = None
    metrics_listen: str | None = None  # a plaintext port for Prometheus: `http://…/metrics`, see docs/metrics.md
    dialects: tuple[str, ...] = ()  # what `listen` speaks beside the contract: see docs/dialects.md
    # OpenAI's and Anthropic's APIs over HTTP, from a process of its own: see docs/http.md. Needs the extra `http`
    http_listen: str | None = None
    # whether adapters may be loaded and unloaded over HTTP, by who may do so over gRPC: see
    # docs/http.md#adapters-at-run-time
    http_admin: bool = False
    # names by which HTTP callers reach the server, such as `loraplex.internal`, where it asks for no credentials and
    # has no certificate: beside `localhost`, the host of `http_listen` and every address they are the only ones taken.
    # See docs/http.md#pages-in-browsers
    http_hosts: tuple[str, ...] = ()
    tls: TlsConfig | None = None  # certificates, for both ports and for HTTP
    # allow other addresses than loopback without TLS or without credentials; also `serve --insecure`
    insecure: bool = False
    # the credentials of callers. Left out: everybody who can reach a listener may call
    auth: AuthConfig | None = None
    tenants: dict[str, TenantConfig] = {}  # the quotas of tenants, by their names: see docs/tenants.md
    other_tenants: TenantConfig = TenantConfig()  # of each tenant that `tenants` does not name
    drain_grace_seconds: float = 30.0  # time for running requests to end after SIGTERM, or when their model is unloaded
    # before that: still serving, but reporting NOT_SERVING to load balancers, so that they use other servers
    lame_duck_seconds: float = 0.0
    log_level: str = "INFO"  # the level of the service and its engines
    # `json` has one object a line, with `trace_id`, `request_id`, the caller's `client_request_id` and `labels`,
    # `tenant` and `adapter` where they are known
    log_format: str = "text"
    # a line for each call and each generation with caller, method, status, tokens and times; never prompts or outputs
    access_log: bool = False
    usage: UsageConfig | None = None  # a record of each generation, for billing
    otlp: OtlpConfig | None = None  # the collector of traces and metrics
    limits: LimitsConfig = LimitsConfig()  # on requests in flight, on sizes and on waiting times
    supervision: SupervisionConfig = SupervisionConfig()  # of the engines

    def with_free_ports(self) -> Self:
        """Return a copy that listens on free loopback ports, whatever the file says."""
        return msgspec.structs.replace(self, listen="127.0.0.1:0", admin_listen="127.0.0.1:0")


def default_config_file() -> Path:
    """The path of the embedded configuration, with models and adapters small enough for any machine."""
    return Path(str(resources.files("loraplex_demo"))) / "loraplex.yaml"


def variables() -> dict[str, FieldInfo]:
    """The names of the environment that set a key of the top level, each with that key."""
    fields = msgspec.structs.fields(ServiceConfig)
    return {
        ENVIRONMENT_PREFIX + field.name.upper(): field
        for field in fields
        if field.type in (str, bool, int, float, str | None)
    }


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
    for variable, field in variables().items():
        if variable not in environment:
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
    yield from _fleet_problems(config)
    if config.auth is not None:
        yield from (f"auth: {problem}" for problem in config.auth.problems())
        if config.auth.certificates and (config.tls is None or config.tls.client_ca is None):
            yield "auth: certificates: no caller is asked for a certificate; set tls.client_ca"
    if config.log_level.upper() not in logging.getLevelNamesMapping():
        yield f"log_level {config.log_level!r} is not one of DEBUG, INFO, WARNING, ERROR"
    if config.usage is not None:
        yield from (f"usage: {problem}" for problem in config.usage.problems())
    if config.otlp is not None:
        yield from (f"otlp: {problem}" for problem in config.otlp.problems())
    yield from choice_problems(config)
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
