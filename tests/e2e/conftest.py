"""The true server: `loraplex serve` as a process, with real engines, on the demo's models and real gRPC ports."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from loraplex import AsyncAdminClient, AsyncClient, Client

DEMO = Path(__file__).resolve().parents[2] / "demo/loraplex_demo"
LORAPLEX = Path(sys.executable).with_name("loraplex")
SPARE = "spare"  # a model that is not loaded
MODELS = {"storyteller": ("pirate", "shouting", "formal", "poet"), "quizzer": ("json",)}
HEADS = {"judge": ("SEQ_CLS", 1), "entities": ("TOKEN_CLS", 3)}  # adapters to be registered: task, labels
FREE_PORTS = {"LORAPLEX_LISTEN": "127.0.0.1:0", "LORAPLEX_ADMIN_LISTEN": "127.0.0.1:0"}
START_SECONDS = 120.0  # two engines on a busy machine
END_SECONDS = 60.0


@dataclass
class Server:
    """A running `loraplex serve`."""

    process: "subprocess.Popen[str]"
    data: str
    admin: str
    roots: Path  # where the test may put adapters
    log: Path
    health: str | None = None  # where `health_listen` is set
    metrics: str | None = None  # where `metrics_listen` is set
    http: str | None = None  # where `http_listen` is set

    def engine_pids(self) -> set[int]:
        return {pid for pid, command in self.children() if "loraplex_engine" in command}

    def children(self) -> list[tuple[int, list[str]]]:
        """Every process that the service has started: its pid and its command line."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [(int(pid), Path(f"/proc/{pid}/cmdline").read_text().split("\0")) for pid in pids]

    def wait_until_serving(self, *models: str) -> None:
        """Until these models are loaded: it listens before."""
        with Client(self.data) as client:
            for model in models:
                client.wait_until_serving(f"models/{model}", timeout=START_SECONDS)

    def terminate(self) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(END_SECONDS)


def write_head(directory: Path, task: str, num_labels: int) -> None:
    """The pirate with a classification head, as PEFT saves one."""
    shutil.copytree(DEMO / "adapters" / "pirate", directory)
    config = json.loads((directory / "adapter_config.json").read_text())
    config |= {"task_type": task, "modules_to_save": ["classifier", "score"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = load_file(directory / "adapter_model.safetensors")
    width = next(tensor.shape[1] for key, tensor in tensors.items() if key.endswith("q_proj.lora_A.weight"))
    head = torch.randn(num_labels, width, generator=torch.Generator().manual_seed(0))
    save_file(tensors | {"base_model.model.score.weight": head}, directory / "adapter_model.safetensors")


def write_config(directory: Path, **settings: object) -> Path:
    """The demo in float32, where a request's greedy tokens do not depend on its neighbours."""
    roots = directory / "adapters"
    roots.mkdir()
    for name, (task, num_labels) in HEADS.items():
        write_head(roots / name, task, num_labels)
    config = {
        "listen": "127.0.0.1:0",
        "admin_listen": "127.0.0.1:0",
        "adapter_roots": [str(DEMO / "adapters"), str(roots)],
        "models": [
            {
                "name": name,
                "model": str(DEMO / "models" / name),
                "dtype": "float32",
                "threads": 1,
                "kv_cache_bytes": 64 << 20,
                "drafts": {"kind": "ngram"},
            }
            for name in MODELS
        ]
        + [{"name": SPARE, "model": str(DEMO / "models" / "quizzer"), "load": False}],
        "usage": {"file": str(directory / "usage.jsonl")},
        "adapters": [
            {"name": adapter, "model": model, "source": str(DEMO / "adapters" / adapter)}
            for model, adapters in MODELS.items()
            for adapter in adapters
        ],
        "supervision": {"heartbeat_seconds": 0.2, "restart_delay_seconds": 0.1},
    }
    file = directory / "loraplex.yaml"
    file.write_text(yaml.safe_dump(config | settings))
    return file


@contextmanager
def running_server(
    directory: Path, command: Sequence[str | Path] = (LORAPLEX,), **settings: object
) -> Iterator[Server]:
    """Started with a configuration, and ended whatever happens."""
    with listening(directory, [*command, "serve", "--config", write_config(directory, **settings)]) as server:
        yield server


@contextmanager
def listening(directory: Path, command: Sequence[str | Path], environment: Mapping[str, str] = {}) -> Iterator[Server]:
    """A server that a command starts, and that is ended whatever happens. It says its ports on its first line."""
    log = directory / "server.log"
    with log.open("w") as log_file:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log_file, text=True, env={**os.environ, **environment}
        )
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening "), f"the server did not start: {log.read_text()}"
        watchdog.cancel()
        ports = dict(word.split("=") for word in line.split()[1:])
        more = (ports.get("health"), ports.get("metrics"), ports.get("http"))
        yield Server(process, ports["data"], ports["admin"], directory / "adapters", log, *more)
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()


@pytest.fixture(scope="session", autouse=True)
def hangups_are_heard() -> Iterator[None]:
    """Servers stop at a hangup, whatever these tests were started with: one that nohup starts would ignore it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all tests that leave it as they found it. Whatever they did, it was prepared for it."""
    with running_server(tmp_path_factory.mktemp("server")) as server:
        yield server
        assert server.terminate() == 0
        assert "Traceback" not in server.log.read_text()


@pytest.fixture
async def client(server: Server) -> AsyncIterator[AsyncClient]:
    """Of the shared server, with all of its models loaded."""
    async with AsyncClient(server.data, timeout=END_SECONDS) as client:
        for name in MODELS:
            await client.wait_until_serving(f"models/{name}", timeout=START_SECONDS)
        yield client


@pytest.fixture
async def admin(server: Server) -> AsyncIterator[AsyncAdminClient]:
    async with AsyncAdminClient(server.admin, timeout=END_SECONDS) as admin:
        yield admin


@pytest.fixture
def own_adapter(server: Server) -> Iterator[Path]:
    """A directory under a root of the server, for an adapter that a test writes."""
    directory = server.roots / "own"
    yield directory
    shutil.rmtree(directory, ignore_errors=True)
