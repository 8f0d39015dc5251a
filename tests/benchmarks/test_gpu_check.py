"""`make gpu-check` with the packages of a bare machine with a GPU, on the CPU: everything else is hidden."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.gpu_check import as_markdown

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
BARE = ("torch", "triton", "transformers", "peft", "grpcio", "numpy", "safetensors", "tokenizers", "pytest", "pip")
CARRIED = ("msgspec", "llguidance", "pyzmq")
# Imported by Python as it starts, and so by each process that it starts: finds what is not hidden.
HIDE = """
import sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class BareMachine(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

    @classmethod
    def find_distributions(cls, *context):
        return (each for each in PathFinder.find_distributions(*context) if each.name not in HIDDEN_PROJECTS)

sys.meta_path[:] = [BuiltinImporter, FrozenImporter, BareMachine]
"""

GpuCheck = Callable[..., "subprocess.CompletedProcess[str]"]
BareMachine = Callable[..., subprocess.CompletedProcess[str]]


def with_dependencies(names: tuple[str, ...]) -> set[str]:
    """The projects of that name and all that they need, by their normalised names."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = normalised(waiting.pop())
        if name in found:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another system
        found.add(name)
        waiting += [re.split(r"[^\w.-]", line)[0] for line in required if "extra ==" not in line]
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.fixture
def bare_machine(tmp_path: Path) -> BareMachine:
    """Runs Python on a machine with the bare packages and `extra` ones: bare_machine(*extra, arguments=(…))."""

    def run(*extra: str, arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
        there = with_dependencies((*BARE, *extra))
        modules = importlib.metadata.packages_distributions().items()
        hidden = {module for module, projects in modules if not there.intersection(map(normalised, projects))}
        hidden = {name for name in hidden if not name.startswith("loraplex")}  # ours are found where it runs
        projects = {each.name for each in importlib.metadata.distributions() if normalised(each.name) not in there}
        (tmp_path / "sitecustomize.py").write_text(f"HIDDEN = {hidden!r}\nHIDDEN_PROJECTS = {projects!r}\n{HIDE}")
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def gpu_check(bare_machine: BareMachine, tmp_path: Path) -> GpuCheck:
    """Runs it on a bare machine: gpu_check(*extra, options=[…])."""

    def run(*extra: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        arguments = ("-m", "benchmarks.gpu_check", "--out", str(tmp_path / "out"), "--interpret", *options)
        return bare_machine(*extra, arguments=arguments)

    return run


def test_all_that_it_imports_is_there_on_a_bare_machine(bare_machine: BareMachine) -> None:
    modules = "benchmarks.gpu_kernels, benchmarks.gpu_engine"
    program = f"from benchmarks.gpu_check import OURS, put_on_path; put_on_path(OURS); import {modules}"
    result = bare_machine(*CARRIED, arguments=("-c", program))
    assert result.returncode == 0, result.stderr


@pytest.mark.long
def test_every_part_runs_with_the_packages_of_a_bare_machine(gpu_check: GpuCheck, tmp_path: Path) -> None:
    result = gpu_check(*CARRIED, options=("--seconds", "7200"))
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    report = json.loads((tmp_path / "out" / "gpu_check.json").read_text())
    assert report["left_out"] == []
    assert report["kernels"]
    assert report["engine"]
    reasons = {line.rpartition(": ")[2] for line in report["tests"]["tail"] if line.startswith("SKIPPED")}
    assert reasons == {"needs a CUDA device"}


def test_what_is_neither_installed_nor_carried_is_named_in_one_line(gpu_check: GpuCheck, tmp_path: Path) -> None:
    result = gpu_check(options=("--packages", str(tmp_path / "nothing")))
    assert result.returncode == 2
    last = result.stderr.splitlines()[-1]
    assert "not installed, and no wheel for this Python" in last
    assert f": {', '.join(CARRIED)}; run `make gpu-packages`" in last


def test_what_is_not_installed_is_taken_from_the_wheels_that_were_carried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks import gpu_check

    wheels, folder = tmp_path / "wheels", tmp_path / "folder"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "carried_along-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_along.py", "")
        metadata = "Metadata-Version: 2.1\nName: carried_along\nVersion: 1.0"
        wheel.writestr("carried_along-1.0.dist-info/METADATA", metadata)
        wheel.writestr("carried_along-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        wheel.writestr("carried_along-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(gpu_check, "NEEDED", ("carried_along",))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert gpu_check.take_from_wheels(["carried_along"], wheels, str(folder)) == []
    assert os.environ["PYTHONPATH"] == f"{folder}{os.pathsep}elsewhere"


def test_a_kernel_that_torch_does_not_have_has_no_time_beside_its_own() -> None:
    row = {"name": "paged", "num_bytes": 4e6, "flops": 2e6, "seconds": 2e-6, "spread": 0.1}
    report: dict[str, object] = {
        "date": "2026-11-30",
        "command": "make gpu-check",
        "machine": {"device": "a GPU", "torch": "2.11", "triton": "3.6"},
        "tests": {"status": 0, "seconds": 1.0, "tail": ["1 passed"]},
        "interpreted": False,
        "left_out": [],
        "copy_bytes_per_second": 4e12,
        "kernels": [row | {"torch_seconds": None}, row | {"torch_seconds": 3e-6}],
    }
    alone, beside = [line for line in as_markdown(report).splitlines() if line.startswith("| paged")]
    assert alone == "| paged | 2.0 | 10% | 2000 | 50% | 1.0 | | |"
    assert beside == "| paged | 2.0 | 10% | 2000 | 50% | 1.0 | 3.0 | 1.50x |"
