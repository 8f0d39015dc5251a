"""Where the time of a step goes: between its kernels, and between the engine and the callers.

    python -m benchmarks.step_profile --model DIR/llama-160m [--cells base:1,8,32 lora8:8 lora32:32] [--out OUT.md]

The engine takes its steps in this process, with a clock around every part; each clock counts what its own part took,
without the parts inside. Steps that only decode and steps that compute prompts are counted apart. Then `loraplex serve`
does the same work, and says how much CPU service and client take beside it: of that, decoding the engine's frame and
making text of the tokens are timed here, on one core and on their own; the rest is gRPC, asyncio and protobuf.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import msgspec

from benchmarks.measure import machine
from benchmarks.serving import System, parse_scenario, system_command
from benchmarks.systems.loraplex_inprocess import Driver, load_adapters
from benchmarks.workload import SCENARIOS, Scenario, make_work
from loraplex_engine.core import EngineCore
from loraplex_engine.execution import model_runner
from loraplex_engine.execution.sampler import Sampler
from loraplex_engine.link.config import EngineConfig
from loraplex_engine.link.messages import FromEngine, StepOutput
from loraplex_engine.models import LanguageModel
from loraplex_engine.scheduling.scheduler import Scheduler
from loraplex_engine.scheduling.step import StepPlan
from loraplex_kernels.cpu.ops import CpuOps
from loraplex_service.bench.records import summarise
from loraplex_service.text import IncrementalDetokenizer, Tokenizer

REST = "the step around them"
# What is timed, in the order of the table: the column, and the methods and functions that make it up.
PARTS: dict[str, tuple[tuple[type | ModuleType, str], ...]] = {
    "scheduler": ((Scheduler, "schedule"), (Scheduler, "update")),
    "batch": ((model_runner, "step_arrays"), (model_runner, "step_batch")),
    "linears": ((CpuOps, "linear"),),
    "LoRA": ((CpuOps, "segmented_lora"),),
    "attention": ((CpuOps, "paged_attention"),),
    "norms, rotary, gate": tuple(
        (CpuOps, name)
        for name in (
            *("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rotary_store_kv"),
            *("silu_and_mul", "gelu_tanh_and_mul", "gelu_tanh", "xielu"),
        )
    ),
    "between kernels": ((LanguageModel, "forward"), (LanguageModel, "logits")),
    "sampler": ((Sampler, "sample"),),
}
DEFAULT_CELLS = {"base": [1, 8, 32], "lora8": [8], "lora32": [32]}
STEP_PARTS = (*PARTS, REST)
SERVICE_PARTS = ("encode frame", "decode frame", "detokenizer")


class Profile:
    """Seconds by part, a list entry for each step of its kind."""

    def __init__(self) -> None:
        self.steps: dict[str, list[dict[str, float]]] = {"decode": [], "prompts": []}
        self._now: dict[str, float] = defaultdict(float)
        self._inside: list[float] = []  # for each clock that runs: what the clocks within it took
        self._kind = "decode"

    @contextmanager
    def clock(self, part: str) -> Iterator[None]:
        self._inside.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self._now[part] += seconds - self._inside.pop()
            if self._inside:
                self._inside[-1] += seconds

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            started = time.perf_counter()
            result = function(*args, **kwargs)
            seconds = time.perf_counter() - started
            self._now[part] += seconds - self._inside.pop()
            if self._inside:
                self._inside[-1] += seconds
            if isinstance(result, StepPlan):
                self._kind = "decode" if all(item.num_new_tokens == 1 for item in result.scheduled) else "prompts"
            return result

        return call

    def end_step(self) -> None:
        self.steps[self._kind].append(dict(self._now))
        self._now.clear()

    def clear(self) -> None:
        for steps in self.steps.values():
            steps.clear()


class ProfiledDriver(Driver):
    """Does to each step's output what the two ends of the bus do, and the detokenizer of each stream."""

    def __init__(self, core: EngineCore, keys: Sequence[Any], tokenizer: Tokenizer, profile: Profile) -> None:
        super().__init__(core, keys)
        self.profile = profile
        self._tokenizer = tokenizer
        self._detokenizers: dict[int, IncrementalDetokenizer] = {}
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    def _deliver(self, message: FromEngine) -> None:
        if isinstance(message, StepOutput):
            with self.profile.clock("encode frame"):
                frame = self._encoder.encode(message)
            with self.profile.clock("decode frame"):
                self._decoder.decode(frame)
            with self.profile.clock("detokenizer"):
                for output in message.outputs:
                    self._detokenizer(output.request_id).push(output.token_ids)
            self.profile.end_step()
        super()._deliver(message)

    def _detokenizer(self, request_id: int) -> IncrementalDetokenizer:
        if request_id not in self._detokenizers:
            self._detokenizers[request_id] = IncrementalDetokenizer(self._tokenizer.pieces(skip_special_tokens=True))
        return self._detokenizers[request_id]


@contextmanager
def clocks(profile: Profile) -> Iterator[None]:
    """Every method of PARTS timed, and the step itself."""
    with ExitStack() as stack:
        for part, methods in (*PARTS.items(), (REST, ((EngineCore, "step"),))):
            for owner, name in methods:
                timed = profile.timed(part, getattr(owner, name))
                stack.enter_context(patch.object(owner, name, timed))
        yield


def in_process(args: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """For each cell the steps' parts, and the throughput with the clocks and without."""
    profile = Profile()
    config = EngineConfig(
        model=str(args.model / "base"), kernels="cpu", threads=args.threads, max_model_len=1024, kv_cache_bytes=1 << 30
    )
    core = EngineCore.load(config)
    with clocks(profile):  # what the model bound while it was loaded is timed, too, if it is loaded here
        timed_core = EngineCore.load(config)
    keys = load_adapters(core, args.model, args.adapters)
    load_adapters(timed_core, args.model, args.adapters)
    tokenizer = Tokenizer.load(args.model / "base")
    plain, timed = Driver(core, keys), ProfiledDriver(timed_core, keys, tokenizer, profile)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(plain.run(plain.warm_up(), 8))
    loop.run_until_complete(timed.run(timed.warm_up(), 8))
    for scenario, streams in cells(args):
        rates: dict[str, list[float]] = {"plain": [], "timed": []}
        profile.clear()
        for repeat in range(args.repeats):
            work = make_work(scenario, streams, repeat)
            records, _ = loop.run_until_complete(plain.run(work, streams))
            rates["plain"].append(summarise(records)["output_tokens_per_second"])
            with clocks(profile):
                records, _ = loop.run_until_complete(timed.run(work, streams))
            rates["timed"].append(summarise(records)["output_tokens_per_second"])
        steps = {kind: list(found) for kind, found in profile.steps.items()}
        yield scenario.name, streams, {"steps": steps} | {key: statistics.median(found) for key, found in rates.items()}
    core.close()
    timed_core.close()


def served(args: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, float]]]:
    """For each cell what a token costs service and client in seconds of CPU, and the throughput."""
    with tempfile.TemporaryDirectory() as logs:
        system = System("grpc", system_command("grpc", None, args), Path(logs) / "grpc.log")
        try:
            for scenario, streams in cells(args):
                runs = [system.run(make_work(scenario, streams, repeat), streams) for repeat in range(args.repeats)]
                found = {
                    part: [run["cpu_seconds"][part] / run["tokens"] for run in runs] for part in ("service", "client")
                }
                found["served"] = [run["output_tokens_per_second"] for run in runs]
                found["tokens_per_message"] = [run["tokens_per_message"] for run in runs]
                yield scenario.name, streams, {key: statistics.median(values) for key, values in found.items()}
        finally:
            system.stop()


def cells(args: argparse.Namespace) -> Iterator[tuple[Scenario, int]]:
    for scenario, counts in args.cells:
        for streams in counts:
            yield scenario, streams


def step_row(head: str, kind: str, steps: Sequence[dict[str, float]], total: int) -> str:
    """Medians by part, in milliseconds, with the parts' share of all of them."""
    parts = [statistics.median(step.get(part, 0.0) for step in steps) for part in STEP_PARTS]
    whole = statistics.median(sum(step.get(part, 0.0) for part in STEP_PARTS) for step in steps)
    share = sum(sum(step.get(part, 0.0) for part in STEP_PARTS) for step in steps) / total if total else 0.0
    figures = [f"{1e3 * seconds:.2f} ({100 * seconds / whole:.0f} %)" for seconds in parts]
    return f"| {head} | {kind} | {100 * share:.0f} % | {1e3 * whole:.2f} | " + " | ".join(figures) + " |"


def report(
    inside: Sequence[tuple[str, int, dict[str, Any]]], outside: Sequence[tuple[str, int, dict[str, float]]]
) -> str:
    lines = [
        "| scenario, streams | steps that | share of the time | a step, ms | " + " | ".join(STEP_PARTS) + " |",
        "|---" * (4 + len(STEP_PARTS)) + "|",
    ]
    for name, streams, found in inside:
        total = sum(step.get(part, 0.0) for steps in found["steps"].values() for step in steps for part in STEP_PARTS)
        lines += [
            step_row(f"{name}, {streams}", {"decode": "decode", "prompts": "compute prompts"}[kind], steps, total)
            for kind, steps in found["steps"].items()
            if steps
        ]
    lines += [
        "",
        "Beyond the step, CPU µs a token:",
        "",
        "| scenario, streams | encode frame (engine) | service | of that: decode frame | detokenizer | gRPC, asyncio, "
        "protobuf | client | messages a token | tokens/s in-process, with the clocks, served |",
        "|---" * 9 + "|",
    ]
    for (name, streams, found), (_, _, beyond) in zip(inside, outside, strict=True):
        decoding = found["steps"]["decode"]
        encode, decode, text = (
            1e6 * statistics.median(step.get(part, 0.0) for step in decoding) / streams for part in SERVICE_PARTS
        )
        service, client = 1e6 * beyond["service"], 1e6 * beyond["client"]
        lines.append(
            f"| {name}, {streams} | {encode:.1f} | {service:.0f} | {decode:.1f} | {text:.1f} | "
            f"{service - decode - text:.0f} | {client:.0f} | {1 / beyond['tokens_per_message']:.2f} | "
            f"{found['plain']:.0f}, {found['timed']:.0f}, {beyond['served']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory made by benchmarks.models")
    default = [(SCENARIOS[name], streams) for name, streams in DEFAULT_CELLS.items()]
    parser.add_argument("--cells", nargs="+", type=parse_scenario, default=default)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args()
    args.adapters = max(scenario.num_adapters for scenario, _ in cells(args))
    inside = list(in_process(args))
    outside = list(served(args))
    about = machine()
    text = (
        f"# A step of {args.model.name}, {date.today()}\n\n{about['cores']} cores of {about['cpu']}.\n\n"
        f"{report(inside, outside)}"
    )
    print(text)
    if args.out is not None:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
