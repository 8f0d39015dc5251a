"""What the large messages of one tenant cost another.

    python -m benchmarks.neighbours
    python -m benchmarks.neighbours --callers 8 --seconds 10

Serves the demo's models and measures what a tenant waits for: a small Tokenize, a stream's first token and the gaps
between its tokens. Alone; beside callers of another tenant, which send messages as large as they may be, of one kind at
a time; and beside processes that only burn as much of the processor as those callers and the server for them. The
second by the first is what a tenant sees. The second by the third leaves out what a machine of few cores has to do with
it: whoever works on it takes the processor from others, however well they are kept apart.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import cpu_seconds_of, machine, process_tree
from loraplex import Client, LoraplexError
from loraplex.prompts import build_prompt
from loraplex_service.bench.records import percentile
from loraplex_service.control.tokenizer import MAX_OFFSETS_BYTES
from loraplex_service.validation.limits import LIMITS, Entries, Text

MODEL = "storyteller"
LOUD, QUIET = {"loraplex-tenant": "loud"}, {"loraplex-tenant": "quiet"}
SENTENCE = "A fox. "
ROOM = 4096  # of a message, for what is around its largest field

Call = Callable[[Client], object]


def most(field: str) -> int:
    """What the table of limits lets this field have."""
    limit = LIMITS[field]
    assert isinstance(limit, Text | Entries)
    return limit.most


def text(size: int) -> str:
    """Of so many bytes, or a few less."""
    return SENTENCE * (size // len(SENTENCE))


CHAT = [{"role": "user", "content": text(most("Prompt.text") - ROOM)}]
LARGE_CALLS: dict[str, Call] = {
    "texts": lambda client: client.tokenize(MODEL, text(most("Prompt.text") - ROOM), metadata=LOUD),
    "chats": lambda client: client.tokenize(MODEL, build_prompt(CHAT), metadata=LOUD),
    "offsets": lambda client: client.tokenize(MODEL, text(MAX_OFFSETS_BYTES), include_offsets=True, metadata=LOUD),
    "tokens": lambda client: client.detokenize(MODEL, [70] * most("DetokenizeRequest.token_ids"), metadata=LOUD),
}

Waits = dict[str, list[float]]  # seconds, by what was waited for


@contextmanager
def served() -> Iterator[tuple[str, int]]:
    """A server of the demo's models: its address, and the id of its process."""
    environment = os.environ | {"LORAPLEX_LISTEN": "127.0.0.1:0", "LORAPLEX_ADMIN_LISTEN": "127.0.0.1:0"}
    command: list[str | Path] = [Path(sys.executable).with_name("loraplex"), "serve"]
    environment["LORAPLEX_STATE_DIRECTORY"] = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            yield dict(word.split("=") for word in process.stdout.readline().split()[1:])["data"], process.pid
        finally:
            process.terminate()


def waited(client: Client, seconds: float) -> Waits:
    """By one caller that does one thing after another."""
    waits: Waits = defaultdict(list)
    over = time.perf_counter() + seconds
    while time.perf_counter() < over:
        for _ in range(10):
            start = time.perf_counter()
            client.tokenize(MODEL, "A fox", metadata=QUIET)
            waits["tokenize"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with client.stream_generate(
            MODEL, "Once", max_tokens=16, min_tokens=16, temperature=0, metadata=QUIET
        ) as stream:
            moments = [time.perf_counter() for event in stream if event.WhichOneof("event") == "delta"]
        waits["first token"].append(moments[0] - start)
        waits["gap"] += [after - before for before, after in itertools.pairwise(moments)]
    return waits


def send(kind: str, address: str) -> None:
    """One large message after another. What is refused is sent again after a while."""
    with Client(address) as client:
        for number in itertools.count():
            try:
                LARGE_CALLS[kind](client)
            except LoraplexError:
                time.sleep(0.1)
            if number == 0:
                print("begun", flush=True)


def burn(share: float) -> None:
    """So much of a core, a little at a time."""
    print("begun", flush=True)
    while True:
        busy = time.process_time() + 0.01 * share
        while time.process_time() < busy:
            pass
        time.sleep(0.01 * (1 - share))


@contextmanager
def beside(arguments: Sequence[str], callers: int) -> Iterator[list[int]]:
    """While so many processes of this module do something else, from when each has begun. Their ids."""
    command = [sys.executable, "-m", "benchmarks.neighbours", *arguments]
    with ExitStack() as stack:
        processes = []
        for _ in range(callers):
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
        yield [process.pid for process in processes]


@dataclass(frozen=True)
class Bench:
    """One server, and one caller that measures."""

    client: Client
    address: str
    server: int
    callers: int
    seconds: float

    def round(self, kind: str) -> dict[str, Waits]:
        """Alone, beside callers that send messages of this kind, and beside the same burning of the processor."""
        alone = waited(self.client, self.seconds)
        with beside(["--send", kind, "--to", self.address], self.callers) as pids:
            cores = self.busy_cores(pids)
            sending = waited(self.client, self.seconds)
        with beside(["--burn", str(min(1.0, cores / self.callers))], self.callers):
            burning = waited(self.client, self.seconds)
        print(f"  {kind}: take {cores:.2f} cores", flush=True)
        return {"alone": alone, "sending": sending, "burning": burning}

    def busy_cores(self, callers: Sequence[int]) -> float:
        """Of the callers and of the server for them, while there is nobody else."""
        members = [*process_tree(self.server), *callers]
        used, start = cpu_seconds_of(members), time.perf_counter()
        time.sleep(2.0)
        return (cpu_seconds_of(members) - used) / (time.perf_counter() - start)


def percentiles(waits: Sequence[float]) -> tuple[float, float]:
    """The 50th and the 99th, in milliseconds."""
    return percentile(waits, 0.5) * 1e3, percentile(waits, 0.99) * 1e3


def show(kind: str, rounds: Sequence[dict[str, Waits]]) -> None:
    """Prints a line for each thing that is waited for: of each figure the median of the rounds."""
    for what in rounds[0]["alone"]:
        figures = [{base: percentiles(waits[what]) for base, waits in one.items()} for one in rounds]

        def median(base: str, place: int, figures: list[dict[str, tuple[float, float]]] = figures) -> float:
            return statistics.median(one[base][place] for one in figures)

        columns = "  ".join(
            f"{base} {median(base, 0):6.2f} {median(base, 1):7.2f}" for base in ("alone", "burning", "sending")
        )
        plain, fair = (median("sending", 1) / median(base, 1) for base in ("alone", "burning"))
        print(f"{kind:8s} {what:12s} {columns}   {plain:5.1f} {fair:5.1f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", choices=LARGE_CALLS, default=list(LARGE_CALLS))
    parser.add_argument("--send", choices=LARGE_CALLS, help=argparse.SUPPRESS)
    parser.add_argument("--burn", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send is not None:
        send(args.send, args.to)
    if args.burn is not None:
        burn(args.burn)
    print(machine())
    with served() as (address, server), Client(address) as client:
        bench = Bench(client, address, server, args.callers, args.seconds)
        client.wait_until_serving(f"models/{MODEL}", timeout=120)
        waited(client, 1.0)
        rounds = defaultdict(list)
        for _, kind in itertools.product(range(args.rounds), args.kinds):
            rounds[kind].append(bench.round(kind))
    print("p50 and p99 in ms; the last two: p99 sending by p99 alone, and by p99 burning")
    for kind in args.kinds:
        show(kind, rounds[kind])


if __name__ == "__main__":
    main()
