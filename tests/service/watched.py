"""A whole service as a process of its own, and what it takes to serve it what it is sent."""

import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
from google.protobuf.message import Message

from loraplex.v1 import adapters_pb2, inference_pb2, models_pb2, pooling_pb2, routes_pb2, server_pb2, tokenizer_pb2

START_SECONDS = 120.0
CALL_SECONDS = 120.0

_MODULES = (adapters_pb2, inference_pb2, models_pb2, pooling_pb2, routes_pb2, server_pb2, tokenizer_pb2)
_PATHS = {
    method.name: f"/{service.full_name}/{method.name}"
    for module in _MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]


class Watched:
    """The running service."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin, self._stdout = process.stdin, process.stdout
        self.data, self.admin = self._stdout.readline().split()

    def held_ms(self) -> float:
        """For how long its event loop was held at a time, since this was asked last."""
        self._stdin.write("\n")
        self._stdin.flush()
        return float(self._stdout.readline())

    def memory_bytes(self) -> int:
        """Anonymous and resident."""
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    def call(self, message: Message, method: str) -> tuple[grpc.StatusCode, str]:
        """What becomes of a call with this message, on a connection of its own. `method`: of a dialect its path."""
        path = _PATHS.get(method, method)
        on_data = path == method or any(service in path for service in ("Inference", "Pooling", "Tokenizer"))
        address = self.data if on_data else self.admin
        with grpc.insecure_channel(address, options=_OPTIONS) as channel:
            call: grpc.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(path)
            try:
                list(call(message.SerializeToString(), timeout=CALL_SECONDS))
            except grpc.RpcError as error:
                return error.code(), error.details() or ""
            return grpc.StatusCode.OK, ""


@contextmanager
def watched_server(tokenizer: Path, roots: Path, address_space: int = resource.RLIM_INFINITY) -> Iterator[Watched]:
    """Ends with the block. `address_space`: bytes that the process may have."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.service.watched_server", str(tokenizer), str(roots)],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (address_space, address_space)),
    )
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        watched = Watched(process)
        watchdog.cancel()
        yield watched
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
