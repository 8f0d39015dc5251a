"""What a server is built of and what its processes take, as families of the metrics page."""

from collections.abc import Iterator, Sequence

from prometheus_client.core import Metric

from loraplex_service.control.builds import build_labels
from loraplex_service.control.metric_families import counter_family, gauge_family
from loraplex_service.control.metrics_snapshot import ModelSnapshot
from loraplex_service.control.processes import processes
from loraplex_service.telemetry.series import Counter


def build_families(models: Sequence[ModelSnapshot]) -> Iterator[Metric]:
    """The versions of the server, and what computes each model."""
    build = build_labels()
    text = "What this server was built of."
    yield gauge_family("loraplex_build_info", text, tuple(build), [(tuple(build.values()), 1.0)])
    rows = [
        ((model.name, limits.implementation, limits.kernel_backend, limits.compiled_for, limits.device.name), 1.0)
        for model in models
        if (limits := model.limits) is not None
    ]
    names = ("model", "implementation", "kernels", "compiled_for", "device")
    yield gauge_family("loraplex_engine_info", "What computes a model, and where.", names, rows)


def process_families(models: Sequence[ModelSnapshot]) -> Iterator[Metric]:
    """The figures of all processes. Reads /proc: not for the event loop."""
    names = ("process", "model")
    found = processes({model.pid: model.name for model in models if model.pid is not None})
    text = "Memory of a process that is in RAM, shared pages included."
    memory = [(each.labels, float(each.resident_bytes)) for each in found]
    yield gauge_family("loraplex_process_resident_memory_bytes", text, names, memory)
    cpu = Counter()
    cpu.values = {each.labels: each.cpu_seconds for each in found}
    yield counter_family("loraplex_process_cpu_seconds", "CPU time of a process since it was started.", names, cpu)
    files = [(each.labels, float(each.open_files)) for each in found]
    yield gauge_family("loraplex_process_open_files", "Descriptors that a process holds.", names, files)
