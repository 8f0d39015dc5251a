"""A guarded server as a process of its own, and how it bears what is done to it."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loraplex_service.auth.keys import KeyFile, make_key, write_keys
from loraplex_service.auth.principal import Role

START_SECONDS = 60.0
SAMPLE_SECONDS = 0.005


@dataclass
class Strain:
    """What something cost the server."""

    peak_bytes: int = 0  # of anonymous memory, beyond what it had before
    held_ms: float = 0.0  # that its event loop was held for at a time


@dataclass
class Guarded:
    """A running server, and a token for each of its two tenants."""

    process: "subprocess.Popen[str]"
    address: str
    loud: str
    quiet: str

    def credentials(self, token: str | None) -> tuple[tuple[str, str], ...]:
        return () if token is None else (("authorization", f"Bearer {token}"),)

    def memory_bytes(self) -> int:
        """Anonymous and resident."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon")

    def held_ms(self) -> float:
        """For how long its loop was held at a time, since this was asked last."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    @contextmanager
    def strain(self) -> Iterator[Strain]:
        """What happens in the block costs this. Read it behind the block."""
        strain, before = Strain(), self.memory_bytes()
        self.held_ms()
        stop = threading.Event()

        def sample() -> None:
            while not stop.wait(SAMPLE_SECONDS):
                strain.peak_bytes = max(strain.peak_bytes, self.memory_bytes() - before)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield strain
        finally:
            stop.set()
            thread.join()
            strain.held_ms = self.held_ms()


@contextmanager
def guarded_server(directory: Path, tokenizer: Path) -> Iterator[Guarded]:
    """Ends with the block, whatever happened."""
    keys = directory / "keys.yaml"
    made = [make_key(tenant, [Role.INFERENCE], None) for tenant in ("loud", "quiet")]
    write_keys(keys, KeyFile(keys=tuple(key for _, key in made)))
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.service.ports.guarded_server", str(tokenizer), str(keys)],
        cwd=Path(__file__).resolve().parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(START_SECONDS, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        watchdog.cancel()
        yield Guarded(process, address, *(token for token, _ in made))
    finally:
        watchdog.cancel()
        process.kill()
        process.communicate()
