"""Compiles the CPU kernels for a wheel, one shared library per instruction set; the rest is in pyproject.toml.

The libraries have a plain C interface and link against neither Python nor torch. Each is optional: without a compiler,
or with one that does not know an instruction set, the installation succeeds and the kernels run on what there is.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path(__file__).parent / "loraplex_kernels" / "cpu"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]  # no processor has the first alone
INSTRUCTION_SETS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512_BF16}
    INSTRUCTION_SETS |= {"amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512fp16"]}
NEWER_FLAGS = {"-mavx512fp16"}  # that GCC 11 does not know: it does without, bytes are then unpacked more slowly

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-pthread",
    "-shared",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a row's bits must not depend on which instantiation the compiler found fusable
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-uninitialized",  # GCC's own AVX512 headers
    "-Wno-maybe-uninitialized",
]


class CompileKernels(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the libraries beside their sources, where an editable installation loads them, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """`build_data`: what hatchling will put into the wheel."""
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
        build_data["artifacts"] += [f"/{path.relative_to(self.root)}" for path in compiled()]


def compiled(
    folder: Path = SOURCES, flags: Sequence[str] = FLAGS, names: Iterable[str] = tuple(INSTRUCTION_SETS)
) -> list[Path]:
    """The libraries in a folder, those compiled again that are older than any of their sources."""
    compiler = find_compiler()
    if compiler is None:
        print("no C++ compiler: the kernels of the CPU are left out", file=sys.stderr)
        return [path for name in names if (path := _library(folder, name)).exists()]

    def compile_for(name: str) -> Path | None:
        return _compile(compiler, _library(folder, name), [*flags, *_flags_of(compiler, name)])

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [path for path in pool.map(compile_for, names) if path is not None]


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _compile(compiler: str, library: Path, flags: list[str]) -> Path | None:
    """None: the compiler cannot."""
    inputs = [Path(__file__), *SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return library
    sources = map(str, sorted(SOURCES.glob("*.cpp")))
    made = library.with_suffix(f".{os.getpid()}.so")  # another build may run beside this one
    try:
        done = subprocess.run([compiler, *flags, *sources, "-o", str(made)], stderr=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{library.name} could not be compiled and is left out:\n{done.stderr}", file=sys.stderr)
            return None
        made.replace(library)
    finally:
        made.unlink(missing_ok=True)
    return library


def _library(folder: Path, name: str) -> Path:
    """Named as the loader looks for it, with no Python version in it."""
    return folder / f"libloraplex_{name}.so"


def _flags_of(compiler: str, name: str) -> list[str]:
    """The flags of an instruction set that the compiler knows."""
    return [flag for flag in INSTRUCTION_SETS[name] if flag not in NEWER_FLAGS or _knows(compiler, flag)]


def _knows(compiler: str, flag: str) -> bool:
    """Whether the compiler takes a flag."""
    command = [compiler, flag, "-x", "c++", "-fsyntax-only", "-"]
    return not subprocess.run(command, input="", stderr=subprocess.DEVNULL, text=True).returncode
