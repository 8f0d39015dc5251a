"""The configuration of the picker: where it listens, which replicas there are, how it weighs them."""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import msgspec

from loraplex_engine.link.bounds import Bounds, choice_problems
from loraplex_service.config import LOOPBACK_HOSTS
from loraplex_service.config_checks import Shape, number_problems
from loraplex_service.config_file import ConfigError, read_yaml

MAX_PORT = 65535
PORTS = Bounds(1, MAX_PORT)


class ReplicasConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The replicas behind one name: one for each address that it has, and each with these ports."""

    BOUNDS: ClassVar[dict[str, Bounds]] = dict.fromkeys(
        ("data_port", "http_port", "health_port", "metrics_port"), PORTS
    )

    host: str  # a name, such as that of a headless service, or an address: each of its addresses is a replica
    data_port: int = 50051  # of `listen`
    http_port: int | None = None  # of `http_listen`. Left out: it takes no HTTP
    health_port: int = 50053  # of `health_listen`
    metrics_port: int = 9464  # of `metrics_listen`

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        if not self.host:
            yield "host is empty: give a name or an address"
        elif not _can_be_asked_for(self.host):
            yield f"host {self.host!r} is no name: its parts have 1 to 63 characters"


class PickerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    CHOICES: ClassVar[dict[str, tuple[str, ...]]] = {"log_level": ("DEBUG", "INFO", "WARNING", "ERROR")}
    BOUNDS: ClassVar[dict[str, Bounds]] = {"balance_factor": Bounds(1, 1e9)}

    replicas: tuple[ReplicasConfig, ...]  # at least one
    listen: str = "127.0.0.1:9002"  # for Envoy: plaintext, and whoever reaches it may ask
    metrics_listen: str | None = None  # its own metrics, in plaintext
    insecure: bool = False  # allow other addresses than loopback: nothing is encrypted, and anybody may ask
    log_level: str = "INFO"  # DEBUG says why a replica is not heard of
    scrape_seconds: float = 0.25  # time between two looks at a replica's metrics
    stale_seconds: float = 3.0  # time after which what a replica said counts no more: at least twice `scrape_seconds`
    resolve_seconds: float = 2.0  # time between two looks at the addresses of a `host`
    queue: int = 4  # requests that any replica may have
    balance_factor: float = 1.5  # of the mean: with more than this and `queue`, a replica is passed over

    def problems(self) -> Iterator[str]:
        """Describe every value that is out of range; empty: none is."""
        yield from choice_problems(self)
        yield from number_problems(self)
        if not self.replicas:
            yield "replicas is empty: name at least one host"
        for index, replicas in enumerate(self.replicas):
            yield from (f"replicas[{index}]: {problem}" for problem in replicas.problems())
            if replicas in self.replicas[:index]:
                yield f"replicas[{index}] is the same as one before: name each once"
        for key in ("listen", "metrics_listen"):
            yield from _address_problems(key, getattr(self, key), self.insecure)
        if self.stale_seconds < 2 * self.scrape_seconds:
            yield f"stale_seconds {self.stale_seconds} must be at least twice scrape_seconds {self.scrape_seconds}"


def load_picker_config(file: Path) -> PickerConfig:
    """Read a file. Raises ConfigError naming everything at fault."""
    fields, problems = read_yaml(file, needed="replicas")
    shape = Shape(PickerConfig)
    fields = shape.pruned(fields, PickerConfig)
    problems = [*problems, *shape.mistakes]
    if not problems:
        config = msgspec.convert(fields, PickerConfig)
        problems = list(config.problems())
        if not problems:
            return config
    raise ConfigError(f"{file}: " + "; ".join(problems))


def _can_be_asked_for(host: str) -> bool:
    try:
        host.encode("idna")  # as it is done before a name is looked up
    except UnicodeError:
        return False
    return True


def _address_problems(key: str, address: str | None, insecure: bool) -> Iterator[str]:
    if address is None:
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > MAX_PORT:
        yield f"{key} {address!r}: an address such as 127.0.0.1:9002 is expected"
    elif host not in LOOPBACK_HOSTS and not insecure:
        yield f"{key} {address!r} can be reached from other machines: set insecure: true where the network is trusted"
