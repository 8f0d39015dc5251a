"""What rounding the weights of a model saves and costs on the CPU: time of its steps, memory, and quality of a text.

    python -m benchmarks.quantized MODEL [--threads 2] [--rounds 8] [--ways int8 w8a8 …]
        [--text FILE --text-model DIR] [--out REPORT.md]

Loads MODEL/base, as `benchmarks.models` writes it, once for each way of rounding it while it is loaded, once as it is,
and once as a copy whose layers' linears and their inputs are integers (w8a8). In each round all take their turn at each
measurement, and medians of the rounds are compared. The text is read by DIR, as `benchmarks.kv_cache` reads it: a model
with random weights has no use for one.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.kv_cache import Reading, cut, read
from benchmarks.measure import machine
from loraplex_engine.core import EngineCore
from loraplex_engine.link.config import QUANTIZATIONS, EngineConfig
from loraplex_engine.link.messages import AddRequest
from loraplex_engine.link.sampling_params import SamplingParams

DENSE, INTEGERS = "as it is", "w8a8"
PROMPT, OUTPUT = 16, 16  # tokens of a stream
WAYS: Mapping[str, dict[str, Any]] = {
    DENSE: {},
    "head int8": {"head_quantization": "int8"},
    **{method: {"quantization": method} for method in QUANTIZATIONS},
    **{f"{method}, head int8": {"quantization": method, "head_quantization": "int8"} for method in QUANTIZATIONS},
    INTEGERS: {},
    f"{INTEGERS}, head int8": {"head_quantization": "int8"},
}
MILLION = 1e6


class Subject:
    """One engine, driven step by step with prompts that it has not seen."""

    def __init__(self, config: EngineConfig) -> None:
        self.core = EngineCore.load(config)
        self._random = random.Random(0)
        self._vocabulary = self.core.runner.model.config.vocab_size
        self._next_id = 0

    def linear_bytes(self, head: bool) -> int:
        """Of the layers' matrices, or of the head."""
        sites = self.core.runner.model.lora_sites()
        linears = {name: site.linear for name, site in sites.items() if hasattr(site, "linear")}
        return sum(linear.nbytes for name, linear in linears.items() if (name == "lm_head") == head)

    def decode(self, streams: int) -> float:
        """Seconds of a step in which every stream gets a token."""
        self._add(streams, PROMPT, OUTPUT)
        self.core.step()
        started, steps = time.perf_counter(), 0
        while self.core.has_work():
            self.core.step()
            steps += 1
        return (time.perf_counter() - started) / steps

    def prefill(self, tokens: int) -> float:
        """Seconds to the first token of a prompt."""
        self._add(1, tokens, 1)
        started = time.perf_counter()
        while self.core.has_work():
            self.core.step()
        return time.perf_counter() - started

    def _add(self, streams: int, prompt: int, output: int) -> None:
        sampling = SamplingParams(seed=0, temperature=0.0, max_tokens=output)
        for _ in range(streams):
            token_ids = [self._random.randrange(self._vocabulary) for _ in range(prompt)]
            self.core.add(AddRequest(self._next_id, token_ids, sampling, None))
            self._next_id += 1


def write_integers(source: Path, target: Path) -> Path:
    """A copy as compressed-tensors has it: each row of the layers' linears scaled to ±127, inputs token by token."""
    shutil.copytree(source, target)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            tensors[name] = weight
            continue
        scale = weight.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        tensors[name] = torch.round(weight.float() / scale).to(torch.int8)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, target / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    weights = {"num_bits": 8, "type": "int", "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    stated = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": stated}))
    return target


def with_integers(model: Path, folder: Path) -> Callable[[str], str]:
    """The directory of a way: that of the model, or of its copy in `folder`."""
    copy = write_integers(model, folder / model.name)
    return lambda way: str(copy if way.startswith(INTEGERS) else model)


MEASUREMENTS: Mapping[str, Callable[[Subject], float]] = {
    "1 stream": partial(Subject.decode, streams=1),
    "8 streams": partial(Subject.decode, streams=8),
    "prefill 128": partial(Subject.prefill, tokens=128),
    "prefill 512": partial(Subject.prefill, tokens=512),
}


def measure(subjects: Mapping[str, Subject], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds by way and measurement. One round more is run before, and not counted."""
    taken: dict[str, dict[str, list[float]]] = {way: {name: [] for name in MEASUREMENTS} for way in subjects}
    for _ in range(rounds + 1):
        for name, run in MEASUREMENTS.items():
            for way, subject in subjects.items():
                taken[way][name].append(run(subject))
    return {
        way: {name: statistics.median(seconds[1:]) for name, seconds in times.items()} for way, times in taken.items()
    }


def speed_table(times: Mapping[str, Mapping[str, float]], subjects: Mapping[str, Subject]) -> Iterator[str]:
    yield f"| weights | {' | '.join(MEASUREMENTS)} | layers' linears MB | head MB |"
    yield "|---" * (3 + len(MEASUREMENTS)) + "|"
    dense = subjects[DENSE]
    for way, subject in subjects.items():
        cells = [f"{taken * 1e3:.2f} ms, {times[DENSE][name] / taken:.2f} ×" for name, taken in times[way].items()]
        for head in (False, True):
            nbytes = subject.linear_bytes(head)
            cells.append(f"{nbytes / MILLION:.1f}, {nbytes / dense.linear_bytes(head):.3f} ×")
        yield f"| {way} | {' | '.join(cells)} |"


def quality_table(readings: Mapping[str, Reading]) -> Iterator[str]:
    yield "| weights | perplexity | mean log-probability error | largest | same best token |"
    yield "|---|---|---|---|---|"
    for way, reading in readings.items():
        errors, same = reading.against(readings[DENSE])
        yield (
            f"| {way} | {reading.perplexity:.4f} | {statistics.fmean(errors):.4f} | {max(errors):.3f} | {same:.2%} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--ways", nargs="+", choices=[way for way in WAYS if way != DENSE], help="beside the dense one")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--text-model", type=Path, help="a directory with a tokenizer.json")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if (args.text is None) != (args.text_model is None):
        parser.error("--text and --text-model come together")
    ways = {way: fields for way, fields in WAYS.items() if way == DENSE or way in (args.ways or WAYS)}
    here = machine()
    lines = [
        f"# Rounded weights of {args.model.name}, {datetime.now(UTC).date()}",
        "",
        f"{here['cores']} cores of {here['cpu']} ({', '.join(here['instruction_sets'])}), {here['memory_gib']} GiB.",
        "",
        f"    python -m benchmarks.quantized {shlex.join(sys.argv[1:])}",
        "",
        "Milliseconds of a step in which each stream gets a token, and to the first token of one prompt; medians of",
        f"{args.rounds} rounds in which all took turns. × is how many times as fast, or as large, as the first line.",
        "",
    ]
    options: dict[str, Any] = {"threads": args.threads, "device": "cpu", "max_model_len": 1024}
    options["enable_prefix_caching"] = False
    with tempfile.TemporaryDirectory() as folder:
        model_of = with_integers(args.model / "base", Path(folder))
        subjects = {
            way: Subject(EngineConfig(model=model_of(way), kv_cache_bytes=1 << 27, **options, **fields))
            for way, fields in WAYS.items()
        }
    lines += speed_table(measure(subjects, args.rounds), subjects)
    for subject in subjects.values():
        subject.core.close()
    if args.text is not None:
        windows = cut(args.text_model, args.text)
        with tempfile.TemporaryDirectory() as folder:
            model_of = with_integers(args.text_model, Path(folder))
            readings = {
                way: read(EngineConfig(model=model_of(way), **options, **fields), windows)
                for way, fields in ways.items()
            }
        count = sum(map(len, windows))
        lines += ["", f"Quality: {args.text_model.name} reads {count} tokens of a text.", "", *quality_table(readings)]
    report = "\n".join(lines) + "\n"
    if args.out is not None:
        args.out.write_text(report)
    print(report)


if __name__ == "__main__":
    main()
