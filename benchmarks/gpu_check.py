"""Everything that only a GPU can say, in one call of under nine minutes: tests, kernels, throughput.

    python -m benchmarks.gpu_check [--out DIR] [--seconds 520] [--models llama-1b llama-8b] [--packages DIR]

Writes DIR/gpu_check.json and DIR/gpu_check.md after each part, so that an interrupted run keeps what it has. Ends with
status 1 if a test failed or a part was left out. Needs torch, triton, numpy, safetensors, pytest, transformers, peft,
msgspec, llguidance and pyzmq, and nothing of the service. A machine with a GPU has most of them; what it lacks is
taken from the wheels in --packages, which `make gpu-packages` fetches where there is a package index.

--interpret runs the same on the CPU under Triton's interpreter with tiny shapes: it shows that the script works, and
its times mean nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = [
    str(ROOT / folder) for folder in ("service", "engine", "adapters", "kernels")
]  # it runs where nothing is installed
NEEDED = ("torch", "triton", "numpy", "safetensors", "pytest", "transformers", "peft", "msgspec", "llguidance", "pyzmq")
IMPORTED_AS = {"pyzmq": "zmq"}
TESTS = (
    "tests/kernels/test_triton_codes.py",
    "tests/kernels/test_triton_quantized.py",
    "tests/kernels/test_quantized_kv.py",
    "tests/kernels/test_triton.py",
    "tests/kernels/test_triton_decoding.py",
    "tests/kernels/test_triton_sampling.py",
    "tests/engine/execution/test_cuda_graph.py",
    "tests/gpu",
    "tests/reference/test_generation.py",
)
ON_THE_CPU = "llama-cpu or llama-reference or qwen3-cpu or qwen3-reference"  # of the last: nothing that a GPU computes
TESTS_SHARE = 0.5  # of the time


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-check"))
    parser.add_argument("--seconds", type=float, default=520.0, help="start nothing new after this long")
    parser.add_argument("--models", nargs="*", default=["llama-1b", "llama-8b"])
    parser.add_argument("--packages", type=Path, default=Path("gpu-packages"), help="wheels of what is not installed")
    parser.add_argument("--interpret", action="store_true")
    args = parser.parse_args()
    put_on_path(OURS)
    with tempfile.TemporaryDirectory() as folder:
        missing = take_from_wheels(missing_packages(), args.packages, folder)
        if missing:
            print(
                f"gpu_check: not installed, and no wheel for this Python in {args.packages}: {', '.join(missing)}; run "
                "`make gpu-packages` where packages can be fetched, and bring the folder here",
                file=sys.stderr,
            )
            return 2
        if args.interpret:
            os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
        return Check(args.out, args.seconds, args.interpret).run(["tiny"] if args.interpret else args.models)


def missing_packages() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(IMPORTED_AS.get(name, name)) is None]


def take_from_wheels(names: list[str], wheels: Path, folder: str) -> list[str]:
    """Unpack packages into `folder`, for this process and those that it starts. Returns those that no wheel has."""
    for name in names:
        found = f"--find-links={wheels}", f"--target={folder}"
        subprocess.run([sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps", *found, name])
    put_on_path([folder])
    return missing_packages()


def put_on_path(folders: list[str]) -> None:
    """Let this process, and those that it starts, import what is in there."""
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*folders, os.environ.get("PYTHONPATH"))))
    importlib.invalidate_caches()


class Check:
    """The parts, their clock and their report."""

    def __init__(self, out: Path, seconds: float, interpret: bool) -> None:
        self._out = out
        self._started = time.monotonic()
        self._seconds = seconds
        self._interpret = interpret
        self._report: dict[str, Any] = {
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": " ".join(["python -m benchmarks.gpu_check", *sys.argv[1:]]),
            "interpreted": interpret,
            "left_out": [],
        }

    def run(self, models: Iterable[str]) -> int:
        import torch
        import triton

        device = torch.device("cpu" if self._interpret else "cuda")
        self._report["machine"] = {
            "device": "Triton's interpreter" if self._interpret else torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        self._tests()
        self._kernels(device)
        for model in models:
            self._engine(model, device)
        self._write()
        return 1 if self._report["tests"]["status"] or self._report["left_out"] else 0

    def _in_time(self) -> bool:
        return time.monotonic() - self._started < self._seconds

    def _tests(self) -> None:
        """In a process of their own, with no configuration: the plug-ins it names may not be installed."""
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
        command += [
            "--import-mode=importlib",
            "-o",
            "markers=gpu",
            "-q",
            "-rs",
            "--maxfail=20",
            "-k",
            f"not ({ON_THE_CPU})",
            *TESTS,
        ]
        if not self._interpret and importlib.util.find_spec("xdist"):
            command += ["-n", "6"]  # most of the time goes into compiling, on the CPU
        started = time.monotonic()
        try:
            result = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, timeout=self._seconds * TESTS_SHARE, check=False
            )
            status, output = result.returncode, result.stdout + result.stderr
        except subprocess.TimeoutExpired as error:
            status, output = -1, (error.stdout or b"").decode() + "\ntimed out"
        print(output, flush=True)
        tail = [line for line in output.splitlines() if line.strip()][-25:]
        self._report["tests"] = {"status": status, "seconds": time.monotonic() - started, "tail": tail}
        self._write()

    def _kernels(self, device: Any) -> None:
        import torch

        from benchmarks import gpu_kernels
        from loraplex_kernels.selection import select_ops

        ops = select_ops(device, "triton")
        sizes = gpu_kernels.TINY if self._interpret else gpu_kernels.EIGHT_BILLION
        self._report["copy_bytes_per_second"] = gpu_kernels.copy_bandwidth(device)
        rows = self._report["kernels"] = []
        with torch.inference_mode():
            for row in gpu_kernels.measure(ops, sizes, torch.bfloat16, self._in_time):
                rows.append(row.to_json())
                print(f"{row.name}: {row.seconds * 1e6:.1f} us", flush=True)
        if not self._in_time():
            self._report["left_out"].append("some kernels: out of time")
        self._write()

    def _engine(self, model: str, device: Any) -> None:
        import torch

        from benchmarks import gpu_engine

        rows = self._report.setdefault("engine", [])
        if not self._in_time():
            self._report["left_out"].append(f"{model}: out of time")
            return
        load = gpu_engine.TINY if self._interpret else gpu_engine.SERVING
        with tempfile.TemporaryDirectory() as folder:
            bench = gpu_engine.Bench(model, Path(folder), load, device, "triton")
            for row in bench.run(self._in_time):
                rows.append(row.to_json())
                print(f"{row.model}, {row.streams} streams: {row.tokens_per_second:.0f} tokens/s", flush=True)
            bench.core.close()
        if not self._in_time():
            self._report["left_out"].append(f"some loads of {model}: out of time")
        del bench
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self._write()

    def _write(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        (self._out / "gpu_check.json").write_text(json.dumps(self._report, indent=1) + "\n")
        (self._out / "gpu_check.md").write_text(as_markdown(self._report))


def as_markdown(report: dict[str, Any]) -> str:
    machine, tests = report["machine"], report["tests"]
    copy = report.get("copy_bytes_per_second")
    lines = [
        f"# GPU check, {report['date']}",
        "",
        f"{machine['device']}, torch {machine['torch']}, triton {machine['triton']}. `{report['command']}`",
        "",
        f"Tests: {'passed' if tests['status'] == 0 else 'FAILED'} in {tests['seconds']:.0f} s: {tests['tail'][-1]}",
    ]
    if report["interpreted"]:
        lines += ["", "Run under the interpreter: the times below mean nothing."]
    lines += ["", *(f"Left out: {what}." for what in report["left_out"])]
    if copy is not None:
        lines += [
            f"Copy bandwidth: {copy / 1e9:.1f} GB/s, read and written together. Times are medians of replayed graphs",
            "on cold data, in microseconds for one call.",
            "",
            "| kernel | us | spread | GB/s | of copy | TFLOP/s | torch us | against torch |",
            "|---|---|---|---|---|---|---|---|",
            *(_kernel_line(row, copy) for row in report.get("kernels", [])),
        ]
    if report.get("engine"):
        lines += [
            "",
            "The whole engine in one process, random bfloat16 weights. Limit: the bytes of a decoding step at the copy",
            "bandwidth.",
            "",
            "| model | streams | adapters | CUDA graphs | tokens/s | TTFT ms | TPOT ms | of the limit |",
            "|---|---|---|---|---|---|---|---|",
            *(_engine_line(row, copy or float("nan")) for row in report["engine"]),
        ]
    return "\n".join(lines) + "\n"


def _kernel_line(row: dict[str, Any], copy: float) -> str:
    rate = row["num_bytes"] / row["seconds"]
    theirs = row["torch_seconds"]  # None: torch has no one operation for it
    beside = "| |" if theirs is None else f"{theirs * 1e6:.1f} | {theirs / row['seconds']:.2f}x |"
    return (
        f"| {row['name']} | {row['seconds'] * 1e6:.1f} | {row['spread']:.0%} | {rate / 1e9:.0f} | {rate / copy:.0%} "
        f"| {row['flops'] / row['seconds'] / 1e12:.1f} | {beside}"
    )


def _engine_line(row: dict[str, Any], copy: float) -> str:
    return (
        f"| {row['model']} | {row['streams']} | {row['adapters']} | {'yes' if row['graphs'] else 'no'} "
        f"| {row['tokens_per_second']:.0f} | {row['ttft_seconds'] * 1e3:.1f} | {row['tpot_seconds'] * 1e3:.2f} "
        f"| {row['step_bytes'] / copy / row['tpot_seconds']:.0%} |"
    )


if __name__ == "__main__":
    sys.exit(main())
