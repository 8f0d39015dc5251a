"""Runs the tests of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer: `make sanitize`.

    python kernels/sanitize.py

Compiles the kernels for the instruction sets that this processor has, into a folder of their own. Ends with the status
of the tests, or at the first mistake that a sanitizer finds. Needs GCC and its sanitizers.
"""

import os
import subprocess
import sys
from pathlib import Path

from build import FLAGS, compiled, find_compiler
from loraplex_kernels.cpu.library import usable_instruction_sets

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitized"
SANITIZED = [
    *(flag for flag in FLAGS if flag not in ("-O3", "-g0")),
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
]
TESTS = ROOT / "tests" / "kernels"


def main() -> int:
    FOLDER.mkdir(parents=True, exist_ok=True)
    names = usable_instruction_sets()
    if not names or len(compiled(FOLDER, SANITIZED, names)) < len(names):
        sys.exit("the kernels of the CPU cannot be compiled with sanitizers here: install GCC and its libasan")
    # Reports are not captured: they come from the process itself, which then ends at once. The profile is that of
    # `make test`: the usual deadlines of hypothesis are too short here.
    options = ["-x", "--capture=no", "-p", "no:faulthandler", "--hypothesis-profile=ci"]
    # All tests of kernels but those of Triton's, so that none is forgotten. One that takes minutes runs this file.
    options += ["-k", "not triton", "-m", "not long"]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment()).returncode


def environment() -> dict[str, str]:
    """What the tests need around them. AddressSanitizer must come first, and find the C++ library when it starts."""
    return {
        "LORAPLEX_CPU_KERNELS": str(FOLDER),
        "LD_PRELOAD": f"{_file('libasan.so')} {_file('libstdc++.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch do not free all that they have at the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",  # so that arrays of ctypes have their own places, too
    }


def _file(library: str) -> str:
    """The path of a library of the compiler."""
    command = [str(find_compiler()), f"-print-file-name={library}"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
