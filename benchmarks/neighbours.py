"""What the large messages of one tenant cost another.

    python -m benchmarks.neighbours
    python -m benchmarks.neighbours --callers 8 --seconds 10

Serves the demo's models and measures a small call of one tenant, again and again: alone, and while callers of another
tenant send messages as large as they may be, of one kind at a time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import machine
from loraplex import Client, LoraplexError
from loraplex.prompts import build_prompt

LARGE = (4 << 20) - 4096  # a message with a text of so many bytes is as large as one may be
MODEL = "storyteller"

Call = Callable[[Client], object]

LARGE_CALLS: dict[str, Call] = {
    "texts": lambda client: client.tokenize(MODEL, "A fox. " * (LARGE // 7), metadata=LOUD),
    "chats": lambda client: client.tokenize(
        MODEL, build_prompt([{"role": "user", "content": "A fox. " * (LARGE // 7)}]), metadata=LOUD
    ),
    "offsets": lambda client: client.tokenize(MODEL, "A fox. " * 4_600, include_offsets=True, metadata=LOUD),
    "tokens": lambda client: client.detokenize(MODEL, [70] * (1 << 20), metadata=LOUD),
}
LOUD, QUIET = {"loraplex-tenant": "loud"}, {"loraplex-tenant": "quiet"}


@contextmanager
def served() -> Iterator[str]:
    """The address of a server of the demo's models."""
    environment = os.environ | {"LORAPLEX_LISTEN": "127.0.0.1:0", "LORAPLEX_ADMIN_LISTEN": "127.0.0.1:0"}
    command = [Path(sys.executable).with_name("loraplex"), "serve"]
    environment["LORAPLEX_STATE_DIRECTORY"] = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield dict(word.split("=") for word in process.stdout.readline().split()[1:])["data"]
        finally:
            process.terminate()


def latencies(client: Client, seconds: float) -> list[float]:
    """Of small calls, one after another, in seconds."""
    measured: list[float] = []
    over = time.perf_counter() + seconds
    while (start := time.perf_counter()) < over:
        client.tokenize(MODEL, "A fox", metadata=QUIET)
        measured.append(time.perf_counter() - start)
    return measured


def send(address: str, kind: str, callers: int) -> None:
    """One large message after another from so many callers. What is refused is sent again after a while."""

    def go_on() -> None:
        with Client(address) as client:
            while True:
                try:
                    LARGE_CALLS[kind](client)
                except LoraplexError:
                    time.sleep(0.1)

    for _ in range(callers):
        threading.Thread(target=go_on).start()


@contextmanager
def sending(address: str, kind: str, callers: int) -> Iterator[None]:
    """While a process of its own does that: this one only measures."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.neighbours",
        "--send",
        kind,
        "--to",
        address,
        "--callers",
        str(callers),
    ]
    with subprocess.Popen(command) as process:
        time.sleep(5.0)
        try:
            yield
        finally:
            process.kill()


def show(name: str, measured: list[float], alone: float | None = None) -> float:
    """Prints a line. Returns the 99th percentile."""
    p50, p99 = statistics.median(measured), statistics.quantiles(measured, n=100)[98]
    beside = f"  {p99 / alone:5.1f} times" if alone else ""
    print(f"{name:10s} {len(measured):6d} calls  p50 {p50 * 1e3:7.2f} ms  p99 {p99 * 1e3:7.2f} ms{beside}", flush=True)
    return p99


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind")
    parser.add_argument("--send", choices=LARGE_CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send is not None:
        send(args.to, args.send, args.callers)
        return
    print(machine())
    with served() as address, Client(address) as client:
        client.wait_until_serving(f"models/{MODEL}", timeout=120)
        latencies(client, 1.0)
        for kind in LARGE_CALLS:
            alone = show("alone", latencies(client, args.seconds))
            with sending(address, kind, args.callers):
                measured = latencies(client, args.seconds)
            show(kind, measured, alone)


if __name__ == "__main__":
    main()
