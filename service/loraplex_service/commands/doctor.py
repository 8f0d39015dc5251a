"""`loraplex doctor`: what this machine has, which models of a configuration fit, and what to do about the rest."""

import importlib.util
import json
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import click

from loraplex_engine.link.host_memory import free_bytes, total_bytes
from loraplex_engine.link.sizes import readable
from loraplex_service.config import ServiceConfig, load_config
from loraplex_service.config_file import ConfigError
from loraplex_service.models.config import HostedModelConfig

GIB: Final = 1 << 30
ENGINE_BYTES: Final = 600 << 20  # of an engine's process without its model: torch and its libraries
EXTRAS: Final = {
    "http": ("uvicorn", "http_listen"),
    "postgresql": ("psycopg", "state"),
    "bench": ("matplotlib", "loraplex bench --plot"),
}
REPORT_SECONDS: Final = 120.0
WEIGHTS: Final = ("*.safetensors", "*.gguf")

Verdict = Literal["ok", "note", "FAIL"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    verdict: Verdict
    text: str  # with what to do, unless all is well


@click.command()
@click.option("--config", type=click.Path(path_type=Path), envvar="LORAPLEX_CONFIG", help="Look at this file, too.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(config: Path | None, as_json: bool) -> None:
    """Say what this machine has, and whether the models of a configuration fit. Exit status 1: something is wrong.

    Without --config the demo's models are looked at.
    """
    findings = list(examine(config))
    if as_json:
        click.echo(json.dumps([{"verdict": each.verdict, "text": each.text} for each in findings], indent=2))
    else:
        for each in findings:
            click.echo(f"{each.verdict:<5} {each.text}")
    sys.exit(1 if any(each.verdict == "FAIL" for each in findings) else 0)


def examine(config: Path | None) -> Iterator[Finding]:
    """Everything that is looked at, one after the other."""
    python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Finding("ok", f"loraplex {version('loraplex-server')}, {python}")
    report = kernel_report()
    yield from of_kernels(report)
    free = free_bytes()
    yield Finding("ok", f"memory: {readable(total_bytes())} that may be used here, {readable(free)} free")
    yield from of_extras()
    try:
        settings = load_config(config, os.environ)
    except ConfigError as error:
        yield Finding("FAIL", f"the configuration cannot be used: {error}")
        return
    yield from of_models(settings, free, report)
    yield from of_ports(settings)


def kernel_report() -> dict[str, Any]:
    """What torch and the kernels say, in a process of their own."""
    command = [sys.executable, "-m", "loraplex_kernels.report"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=REPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"error": f"`{' '.join(command)}` did not end within {REPORT_SECONDS:g} s"}
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or [f"exit status {ended.returncode}"]
        return {"error": last[0]}
    answer: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return answer


def of_kernels(report: dict[str, Any]) -> Iterator[Finding]:
    """What engines would compute with."""
    if "error" in report:
        yield Finding("FAIL", f"torch or the kernels do not load: {report['error']}. Install again: make demo")
        return
    cpu = report["cpu"]
    if "error" in cpu:
        yield Finding("FAIL", f"CPU kernels: {cpu['error']}. Install again where there is a C++ compiler")
    else:
        yield Finding("ok", f"CPU kernels: {cpu['instruction_set']}, {cpu['cores']} cores; torch {report['torch']}")
    for gpu in report["gpus"]:
        free = f"{gpu['free_bytes'] / GIB:.1f} of {gpu['memory_bytes'] / GIB:.1f} GiB free"
        if report["triton"] is None:
            yield Finding("FAIL", f"{gpu['name']}: {free}, and no Triton for its kernels: pip install triton")
        else:
            yield Finding("ok", f"{gpu['name']}: {free}; CUDA {report['cuda']}, Triton {report['triton']}")
    if not report["gpus"]:
        build = "this torch is built without CUDA" if report["cuda"] is None else f"CUDA {report['cuda']} sees none"
        yield Finding("note", f"no GPU ({build}): models compute on the CPU")


def of_extras() -> Iterator[Finding]:
    """Extras that are not installed, and what they are for."""
    for extra, (module, use) in EXTRAS.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("note", f"{use} needs the extra `{extra}`: pip install 'loraplex-server[{extra}]'")


def of_models(settings: ServiceConfig, room: int, report: dict[str, Any]) -> Iterator[Finding]:
    """Whether each model fits into what is left by those before it. An estimate, by the size of its files."""
    for model in settings.models:
        if not model.load:
            continue
        if (files := weight_bytes(model)) is None:
            yield Finding("note", f"{model.name}: {model.model} is not on this machine yet: its size is not known")
            continue
        if model.device.startswith("cuda") or (model.device == "auto" and report.get("gpus")):
            yield Finding("note", f"{model.name}: {readable(files)} of weights, to go to a GPU")
            continue
        need = ENGINE_BYTES + files + (model.kv_cache_bytes or 0)
        said = f"{model.name}: about {readable(need)} (weights {readable(files)}) of {readable(room)} left"
        if need > room:
            remedy = "quantise it (quantization:), or lower kv_cache_bytes"
            yield Finding("FAIL", f"{said}: does not fit; {remedy}, or free memory")
        else:
            yield Finding("ok", said)
        room -= need


def of_ports(settings: ServiceConfig) -> Iterator[Finding]:
    """Ports that are taken."""
    for key in ("listen", "admin_listen", "http_listen", "metrics_listen", "health_listen"):
        address: str | None = getattr(settings, key)
        if address is None or address.endswith(":0"):
            continue
        host, _, port = address.rpartition(":")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((host.strip("[]"), int(port)))
            except OSError as error:
                said = f"{key} {address}: {error.strerror}"
                yield Finding("note", f"{said}; does a server run already? Else set another one")


def weight_bytes(model: HostedModelConfig) -> int | None:
    """The bytes of the model's files; None: they are not here."""
    place = Path(model.model)
    if place.is_file():
        return place.stat().st_size
    sizes = [file.stat().st_size for pattern in WEIGHTS for file in place.glob(pattern)] if place.is_dir() else []
    return sum(sizes) if sizes else None
