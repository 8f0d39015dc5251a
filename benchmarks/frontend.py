"""What the service costs between the engine and its callers.

    python -m benchmarks.frontend alone --model DIR/llama-160m --offered 130000 --streams 64 256
    python -m benchmarks.frontend http --model DIR/llama-160m --offered 12000 --streams 12 32
    python -m benchmarks.frontend overhead --model DIR/llama-160m --cells base:8,32 lora8:32
    python -m benchmarks.frontend telemetry --model DIR/llama-160m --cells base:32

`alone`: the service with a source of tokens in place of an engine, which gives every stream one token a step at a fixed
rate; what has queued up for a stream goes out as one message. Tokens a second as the client got them, while all streams
ran.

`http`: the same over HTTP against gRPC, in turns; as the median of the repeats' ratios. With --engine the model's own
engine is the source: a tiny one, whose steps take no longer than the service does.

`overhead`: the engine within one process against `loraplex serve`, in turns; the share of the throughput that gRPC,
tokenizer, detokenizer and the bus between the processes cost, as the median of the repeats' ratios.

`telemetry`: `loraplex serve` without any against one with all of it, in turns; with --steps-per-second N a source of
tokens stands in place of the engine, so that the service is what limits.

All print what each process used of the CPU: the client is one of them, and takes its share of the same cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc

from benchmarks.measure import machine
from benchmarks.serving import System, parse_scenario, system_command
from benchmarks.systems.loraplex_grpc import free_ports
from benchmarks.workload import FIRST_TOKEN_ID, SCENARIOS, SEED, VOCAB, Work, make_work
from loraplex_service.bench.records import Record, summarise

SECONDS = 5.0  # of each repeat of `alone`
SCRAPE_SECONDS = 5.0  # Prometheus' own default is a minute, charts say 15 s
PROMPT_TOKENS = 16
ENGINE_TOKENS = 960  # of each stream: the systems' max_model_len is 1,024

Result = dict[str, Any]
Figures = Callable[[Sequence[Record]], dict[str, float]]  # of one repeat


def alone(args: argparse.Namespace, logs: Path) -> list[Result]:
    """One server for each number of streams, because the rate of its steps is fixed at its start."""
    results = []
    for streams in args.streams:
        steps_per_second = args.offered / streams
        system = System("alone", alone_command(args, steps_per_second), logs / f"alone-{streams}.log")
        try:
            work = alone_work(streams, round(steps_per_second * SECONDS))
            for _ in range(args.repeats):
                result = system.run(work, streams, steady)
                results.append({"streams": streams, "offered": args.offered} | result)
                print_result(f"alone c{streams:<4}", result)
        finally:
            system.stop()
    return results


def http(args: argparse.Namespace, logs: Path) -> list[Result]:
    """What streams over HTTP bring, against the same over gRPC."""
    results = []
    for streams in args.streams:
        steps_per_second = None if args.engine else args.offered / streams
        command = alone_command(args, steps_per_second)
        work = alone_work(streams, ENGINE_TOKENS if steps_per_second is None else round(steps_per_second * SECONDS))
        commands = {"gRPC": command, "HTTP": [*command, "--http"]}
        with together(commands, logs) as systems:
            turns = (in_turns(systems, f"c{streams}", work, streams, repeat, steady) for repeat in range(args.repeats))
            results += [{"streams": streams, "offered": args.offered} | runs for runs in compared(f"c{streams}", turns)]
    return results


def alone_command(args: argparse.Namespace, steps_per_second: float | None) -> list[str]:
    """A server with a source of tokens; None: with the model's engine."""
    command = [sys.executable, "-m", "benchmarks.systems.loraplex_grpc", "--model", str(args.model), "--adapters", "0"]
    return command if steps_per_second is None else [*command, "--steps-per-second", str(steps_per_second)]


def alone_work(streams: int, output: int) -> list[Work]:
    rng = random.Random(SEED)
    return [
        Work([rng.randrange(FIRST_TOKEN_ID, VOCAB) for _ in range(PROMPT_TOKENS)], output, None) for _ in range(streams)
    ]


def steady(records: Sequence[Record]) -> dict[str, float]:
    """Throughput between the moments at which the last stream began and the first one ended."""
    begin = max(record.arrivals[0][0] for record in records)
    end = min(record.arrivals[-1][0] for record in records)
    tokens = sum(count for record in records for moment, count in record.arrivals if begin < moment <= end)
    return {"output_tokens_per_second": tokens / (end - begin), "steady_seconds": end - begin}


def overhead(args: argparse.Namespace, logs: Path) -> list[Result]:
    """What the service takes of the throughput of an engine within one process."""
    args.adapters = max(scenario.num_adapters for scenario, _ in args.cells)
    commands = {name: system_command(name, None, args) for name in ("inprocess", "grpc")}
    return paired(commands, args, logs)


def telemetry(args: argparse.Namespace, logs: Path) -> list[Result]:
    """What telemetry takes of the throughput: metrics page, usage records, JSON and access log, all traces by OTLP."""
    args.adapters = max(scenario.num_adapters for scenario, _ in args.cells)
    if args.steps_per_second is None:
        command = system_command("grpc", None, args)
    else:
        command = alone_command(args, args.steps_per_second)
    page = f"127.0.0.1:{free_ports(1)[0]}"
    with otlp_sink() as endpoint, scraped(page):
        settings = {
            "metrics_listen": page,
            "log_format": "json",
            "access_log": True,
            "usage": {"file": str(logs / "usage.jsonl")},
            "otlp": {"endpoint": endpoint, "metrics_seconds": 5},
        }
        return paired({"off": command, "on": [*command, "--settings", json.dumps(settings)]}, args, logs)


@contextmanager
def otlp_sink() -> Iterator[str]:
    """Somebody who takes everything and keeps nothing."""

    class Sink(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
            return grpc.unary_unary_rpc_method_handler(lambda request, context: b"")

    server = grpc.server(ThreadPoolExecutor(2), [Sink()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(None)


@contextmanager
def scraped(page: str) -> Iterator[None]:
    """Somebody who reads the metrics page now and then, once it is there."""
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(SCRAPE_SECONDS):
            with suppress(OSError), urllib.request.urlopen(f"http://{page}/metrics", timeout=SCRAPE_SECONDS) as answer:
                answer.read()

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def paired(commands: dict[str, list[str]], args: argparse.Namespace, logs: Path) -> list[Result]:
    """What the second of two systems loses against the first."""
    results = []
    with together(commands, logs) as systems:
        for scenario, streams in ((scenario, streams) for scenario, counts in args.cells for streams in counts):
            head = f"{scenario.name} c{streams}"
            works = (args.rounds * make_work(scenario, streams, repeat) for repeat in range(args.repeats))
            turns = (in_turns(systems, head, work, streams, repeat) for repeat, work in enumerate(works))
            results += [{"scenario": scenario.name, "streams": streams} | runs for runs in compared(head, turns)]
    return results


@contextmanager
def together(commands: dict[str, list[str]], logs: Path) -> Iterator[dict[str, System]]:
    """Systems that are up at the same time."""
    systems: dict[str, System] = {}
    try:
        for name, command in commands.items():
            systems[name] = System(name, command, logs / f"{name}.log")
        yield systems
    finally:
        for system in systems.values():
            system.stop()


def in_turns(
    systems: dict[str, System], head: str, work: list[Work], streams: int, repeat: int, figures: Figures = summarise
) -> dict[str, Result]:
    """One repeat of each system; who is first changes from repeat to repeat."""
    runs: dict[str, Result] = {}
    for name in list(systems) if repeat % 2 else reversed(systems):
        runs[name] = systems[name].run(work, streams, figures)
        print_result(f"{name:>9} {head}", runs[name])
    return {name: runs[name] for name in systems}


def compared(head: str, repeats: Iterable[dict[str, Result]]) -> list[dict[str, Result]]:
    """Print what the second system of the repeats loses against the first. Returns the repeats."""
    done = list(repeats)
    ratios = []
    for runs in done:
        before, after = (run["output_tokens_per_second"] for run in runs.values())
        ratios.append(after / before)
    after_name = list(done[0])[1]
    median, low, high = (100 * (1 - share(ratios)) for share in (statistics.median, max, min))
    print(f"{head}: {after_name} loses {median:.1f} % ({low:.1f} to {high:.1f})", flush=True)
    return done


def print_result(head: str, result: Result) -> None:
    if "error" in result:
        raise RuntimeError(f"{head}: {result['error']}")
    costs = "  ".join(f"{part} {1e6 * cpu / result['tokens']:6.1f}" for part, cpu in result["cpu_seconds"].items())
    print(
        f"{head} {result['output_tokens_per_second']:9.1f} tok/s  {result['tokens_per_message']:5.1f} tok/message  "
        f"CPU µs/token: {costs}{'  contended' if result['contended'] else ''}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="alone|http|overhead|telemetry")
    for measure in (alone, http, overhead, telemetry):
        command = commands.add_parser(measure.__name__, help=(measure.__doc__ or "").splitlines()[0])
        command.set_defaults(measure=measure)
        command.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
        command.add_argument("--repeats", type=int, default=3)
        command.add_argument("--out", type=Path, help="a JSON file")
        if measure in (alone, http):
            command.add_argument("--offered", type=float, default=130_000, help="tokens a second over all streams")
            command.add_argument("--streams", type=int, nargs="+", default=[64, 256])
        if measure is http:
            command.add_argument("--engine", action="store_true", help="let the model's engine be the source of tokens")
        if measure in (overhead, telemetry):
            command.add_argument("--threads", type=int, default=os.cpu_count() or 1)
            command.add_argument("--cells", nargs="+", type=parse_scenario, default=[(SCENARIOS["base"], [8, 32])])
            command.add_argument("--rounds", type=int, default=1, help="how often each repeat does its work")
        if measure is telemetry:
            command.add_argument("--steps-per-second", type=float, help="of a source of tokens")
    args = parser.parse_args()
    run: Callable[[argparse.Namespace, Path], list[Result]] = args.measure
    with tempfile.TemporaryDirectory() as logs:
        results = run(args, Path(logs))
    if args.out is not None:
        report = {"measure": run.__name__, "model": args.model.name, "machine": machine(), "results": results}
        args.out.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
