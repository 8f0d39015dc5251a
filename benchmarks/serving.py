"""Serve the same work with several systems in one run, and say how fast each was.

    python -m benchmarks.serving --model DIR/llama-160m --systems grpc,hf --cells base:1,8 lora8:8 chat:0.5,1 --out OUT

A cell is a scenario with numbers of streams, each of which sends its next request when its last has ended; or a traffic
with rates, of requests a second that come whatever became of others.

Systems: `grpc` (loraplex serve), `inprocess` (EngineCore), `reference` (EngineCore on the torch kernels), and the
others, each with the Python of its own environment: `hf=PYTHON`, `vllm=PYTHON`, `vllm-nolora=PYTHON`,
`llamacpp=SERVER_BINARY`. `hf` alone means this environment. With a format behind it, a system serves the same model
rounded while it is loaded, `grpc-int4`, `inprocess-nf4`, or as a file of `benchmarks.gguf`: `inprocess-Q4_K_M` and
`llamacpp-Q4_K_M=SERVER_BINARY` have the same one.

All systems are up during the whole run and take turns, repeat by repeat; a figure is the median of its repeats. A
repeat in which other processes used more than a tenth of the machine is marked contended. Writes OUT.json, and OUT.md
with OUT.png through `benchmarks.report`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gguf import KINDS as GGUF_KINDS
from benchmarks.measure import ContentionMeter, machine, median_of, resident_bytes
from benchmarks.report import write_report
from benchmarks.roofline import ModelCost, Roofline, output_limit
from benchmarks.workload import SCENARIOS, TRAFFIC, Scenario, Traffic, Work, make_traffic, make_work
from loraplex_engine.link.config import QUANTIZATIONS
from loraplex_service.bench.records import Record, summarise, summarise_traffic

CONTENDED_SHARE = 0.10
FIRST_PORT = 18180  # of llama.cpp's servers: several may be up in one run
SHARED = Path(__file__).resolve().parents[1] / "service"  # loraplex_service.bench, for environments without Loraplex

Cells = tuple[Scenario, list[int]] | tuple[Traffic, list[float]]  # numbers of streams, or requests a second


class System:
    """One system under test, in its own process."""

    def __init__(self, name: str, command: list[str], log: Path) -> None:
        self.name = name
        environment = {**os.environ, "PYTHONPATH": str(SHARED)}
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment
            )
        self.about = self._answer()

    def run(
        self,
        work: Sequence[Work],
        concurrency: int | None,
        figures: Callable[[Sequence[Record]], dict[str, float]] = summarise,
    ) -> dict[str, Any]:
        """One repeat: its figures, or the error that the system ended it with. concurrency None: an open loop."""
        assert self._process.stdin is not None
        with ContentionMeter(os.getpid()) as meter:
            print(
                json.dumps({"work": [item.to_json() for item in work], "concurrency": concurrency}),
                file=self._process.stdin,
                flush=True,
            )
            answer = self._answer()
        if "error" in answer:
            return {"error": answer["error"]}
        records = [
            Record(**{**fields, "arrivals": [tuple(a) for a in fields["arrivals"]]}) for fields in answer["records"]
        ]
        tokens = sum(record.num_output for record in records)
        return figures(records) | {
            "cpu_seconds": answer.get("cpu_seconds", {}),
            "tokens": tokens,
            "tokens_per_message": tokens / sum(len(record.arrivals) for record in records),
            "memory_bytes": resident_bytes(self._process.pid),
            "foreign_share": meter.foreign_share,
            "contended": meter.foreign_share > CONTENDED_SHARE,
        }

    def stop(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended: see its log")
        answer: dict[str, Any] = json.loads(line)
        return answer


def system_command(name: str, where: str | None, args: argparse.Namespace) -> list[str]:
    """The command line of a system. Raises ValueError for one that is not known."""
    common = ["--model", str(args.model), "--threads", str(args.threads)]
    adapters = ["--adapters", str(args.adapters)]
    longest = max(load.longest for load, _ in args.cells)
    serving = ["--max-model-len", str(-(-longest // 1024) * 1024)]
    python = where or sys.executable
    modules = {
        "grpc": (sys.executable, "loraplex_grpc", [*adapters, *serving]),
        "inprocess": (sys.executable, "loraplex_inprocess", [*adapters, *serving]),
        "reference": (sys.executable, "loraplex_inprocess", [*adapters, *serving, "--kernels", "reference"]),
        "hf": (python, "hf_peft", adapters),
        "vllm": (python, "vllm_python", [*adapters, *serving]),
        "vllm-nolora": (python, "vllm_python", ["--adapters", "0", *serving]),
        "llamacpp": (sys.executable, "llama_cpp", [*adapters, *serving, "--server", where or "llama-server"]),
    }
    forms = {method: ["--quantization", method] for method in QUANTIZATIONS}
    forms |= {kind: ["--base", f"gguf/{kind}.gguf"] for kind in GGUF_KINDS}
    for own in ("grpc", "inprocess"):
        interpreter, module, options = modules[own]
        modules |= {f"{own}-{form}": (interpreter, module, [*options, *option]) for form, option in forms.items()}
    interpreter, module, options = modules["llamacpp"]
    for port, kind in enumerate(GGUF_KINDS, FIRST_PORT):
        modules[f"llamacpp-{kind}"] = (interpreter, module, [*options, "--gguf", f"{kind}.gguf", "--port", str(port)])
    modules["llamacpp"] = modules["llamacpp-BF16"]
    if name not in modules:
        raise ValueError(f"unknown system {name!r}: choose from {', '.join(modules)}")
    interpreter, module, options = modules[name]
    return [interpreter, "-m", f"benchmarks.systems.{module}", *common, *options]


def measure_roofline(threads: int) -> Roofline:
    """In a process of its own, so that its threads and memory are gone before the systems start."""
    command = [sys.executable, "-m", "benchmarks.roofline", "--json", "--threads", str(threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Roofline(**json.loads(output.splitlines()[-1]))


def parse_scenario(text: str) -> tuple[Scenario, list[int]]:
    """ "lora8:1,8" → the scenario and [1, 8]. For argparse: raises ArgumentTypeError."""
    name, _, streams = text.partition(":")
    if name not in SCENARIOS or not all(part.isdecimal() and int(part) for part in streams.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: SCENARIO:STREAMS,… with one of {', '.join(SCENARIOS)}")
    return SCENARIOS[name], [int(part) for part in streams.split(",")]


def parse_cells(text: str) -> Cells:
    """Those, or "chat:0.5,1" → the traffic and [0.5, 1.0]."""
    name, _, rates = text.partition(":")
    if name not in TRAFFIC:
        return parse_scenario(text)
    if not all(re.fullmatch(r"\d+(\.\d+)?", part) and float(part) for part in rates.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: {name}:REQUESTS_PER_SECOND,…")
    return TRAFFIC[name], [float(part) for part in rates.split(",")]


def can_run(name: str, load: Scenario | Traffic) -> bool:
    if name == "vllm-nolora":
        return not load.num_adapters
    return name != "hf" or (isinstance(load, Scenario) and not load.is_sampled)  # it decodes one static batch, greedily


def run_once(system: System, load: Scenario | Traffic, level: float, repeat: int) -> dict[str, Any]:
    if isinstance(load, Traffic):
        return system.run(make_traffic(load, level, repeat), None, summarise_traffic)
    return system.run(make_work(load, int(level), repeat), int(level))


def measure(systems: dict[str, System], roofline: Roofline, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every cell: a scenario with a number of streams, a traffic with a rate; systems take turns in each repeat."""
    cost = ModelCost.read(args.model)
    cells = []
    for load, levels in args.cells:
        for level in levels:
            runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems if can_run(name, load)}
            for repeat in range(args.repeats):
                for name in runs:
                    result = run_once(systems[name], load, level, repeat)
                    runs[name].append(result)
                    print_run(name, load, level, result)
            if isinstance(load, Traffic):
                place: dict[str, Any] = {"traffic": load.name, "requests_per_second": level}
            else:
                limit = output_limit(cost, roofline, load, level)
                place = {"scenario": load.name, "concurrency": level, "limit": limit}
            for name, results in runs.items():
                good = [result for result in results if "error" not in result]
                quiet = [result for result in good if not result["contended"]]
                cells.append(
                    {
                        "system": name,
                        "adapters": load.num_adapters,
                        **place,
                        "median": median_of(quiet or good) if good else None,
                        "uncontended_repeats": len(quiet),
                        "repeats": results,
                    }
                )
    return cells


def shown_command(args: argparse.Namespace) -> str:
    """The command to run again elsewhere: where things are on this machine is left out."""
    names = [entry.partition("=") for entry in args.systems.split(",")]
    systems = ",".join(name + ("=WHERE" if separator else "") for name, separator, _ in names)
    cells = " ".join(f"{load.name}:{','.join(map(str, levels))}" for load, levels in args.cells)
    return (
        f"python -m benchmarks.serving --model DIR/{args.model.name} --systems {systems} --cells {cells} "
        f"--repeats {args.repeats} --adapters {args.adapters} --threads {args.threads} --out OUT"
    )


def print_run(name: str, load: Scenario | Traffic, level: float, result: dict[str, Any]) -> None:
    head = f"{name:>12} {load.name:>18} {level:<4g}"
    if "error" in result:
        print(head, result["error"], flush=True)
        return
    print(
        f"{head} {result['output_tokens_per_second']:8.1f} tok/s  "
        f"TTFT p50 {result['ttft_p50_seconds'] * 1e3:7.1f} ms  TPOT p50 {result['tpot_p50_seconds'] * 1e3:6.1f} ms"
        f"{'  in time {:4.0%}'.format(result['share_in_time']) if 'share_in_time' in result else ''}"
        f"{'  contended' if result['contended'] else ''}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
    parser.add_argument("--systems", default="grpc,inprocess", help="comma-separated, NAME or NAME=WHERE")
    parser.add_argument(
        "--cells",
        nargs="+",
        type=parse_cells,
        default=[(SCENARIOS["base"], [1, 8]), (SCENARIOS["lora8"], [1, 8])],
        metavar="LOAD:LEVEL,…",
        help=f"what to run; scenarios, with streams: {', '.join(SCENARIOS)}; traffic, with requests per second: "
        f"{', '.join(TRAFFIC)}",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--adapters", type=int, default=32, help="adapters that each system holds")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    roofline = measure_roofline(args.threads)
    print(roofline, flush=True)
    systems: dict[str, System] = {}
    try:
        for entry in args.systems.split(","):
            name, _, where = entry.partition("=")
            command = system_command(name, where or None, args)
            systems[name] = System(name, command, args.out.with_name(f"{args.out.name}.{name}.log"))
            print(f"{name}: {systems[name].about}", flush=True)
        cells = measure(systems, roofline, args)
    finally:
        for system in systems.values():
            system.stop()
    report = {
        "date": datetime.date.today().isoformat(),
        "command": shown_command(args),
        "model": args.model.name,
        "machine": machine(),
        "roofline": asdict(roofline),
        "systems": {name: system.about for name, system in systems.items()},
        "cells": cells,
    }
    path = args.out.with_name(args.out.name + ".json")
    path.write_text(json.dumps(report, indent=1))
    write_report(report, args.out)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
