"""Compiles the CPU kernels, one shared library per instruction set; everything else is in pyproject.toml.

The libraries have a plain C interface and link against neither Python nor torch. Each is optional: without a compiler,
or with one that does not know an instruction set, the installation succeeds and the kernels run on what there is.
"""

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("kernels/cpu")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
INSTRUCTION_SETS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": AVX512_BF16}
    INSTRUCTION_SETS |= {"amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mavx512fp16"]}
NEWER_FLAGS = {"-mavx512fp16"}  # that GCC 11 does not know: it does without, bytes are then unpacked more slowly

FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-pthread",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # a row's bits must not depend on which instantiation the compiler found fusable
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-uninitialized",  # GCC's own AVX512 headers
    "-Wno-maybe-uninitialized",
]


class BuildLibraries(build_ext):
    """Names the results as the loader looks for them: lib<name>.so, with no Python version in it."""

    def get_ext_filename(self, fullname: str) -> str:
        package, _, name = fullname.rpartition(".")
        return str(Path(*package.split("."), f"{name}.so"))

    def initialize_options(self) -> None:
        super().initialize_options()
        self.parallel = os.cpu_count()  # one library per thread

    def build_extension(self, ext: Extension) -> None:
        # Each instruction set compiles the same sources: keep their objects apart.
        folder = str(Path(self.build_temp, ext.name))
        flags = [flag for flag in ext.extra_compile_args if flag not in NEWER_FLAGS or self.knows(flag)]
        objects = self.compiler.compile(ext.sources, output_dir=folder, extra_postargs=flags, depends=ext.depends)
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(library), extra_postargs=ext.extra_link_args, target_lang=ext.language
        )

    def knows(self, flag: str) -> bool:
        """Whether the compiler takes a flag."""
        probe = Path(self.build_temp, "probe.cpp")
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        try:
            self.compiler.compile([str(probe)], output_dir=self.build_temp, extra_postargs=[flag])
        except CompileError:
            return False
        return True


setup(
    cmdclass={"build_ext": BuildLibraries},
    ext_modules=[
        Extension(
            f"kernels.cpu.libloraplex_{name}",
            sources=[str(path) for path in sorted(SOURCES.glob("*.cpp"))],
            depends=[str(path) for path in sorted(SOURCES.glob("*.h"))],
            extra_compile_args=FLAGS + flags,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, flags in INSTRUCTION_SETS.items()
    ],
)
