"""Write a model of `benchmarks.models` as llama.cpp takes it, with llama.cpp's own converters.

    python -m benchmarks.gguf DIR/llama-160m --source LLAMA_CPP --quantize LLAMA_QUANTIZE [--adapters 8]

Makes DIR/MODEL/gguf with BF16.gguf, a file for each way of rounding that one, and a00.gguf …, adapters. LLAMA_CPP is
the directory of llama.cpp's source, LLAMA_QUANTIZE the program built from it. Files that are there are left.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

KINDS = ("BF16", "Q8_0", "Q4_K_M")
# The converters know tokenizers by their hash. What they call "gpt-2" is what a byte-level one without more is.
CONVERT = """
import runpy, sys
source, script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
sys.path[:0] = [f"{source}/gguf-py", source]
from conversion import base
base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path(f"{source}/{script}", run_name="__main__")
"""


def convert(source: Path, script: str, out: Path, *arguments: str) -> None:
    """Run one of the converters of `source`. Raises CalledProcessError if it fails."""
    if out.exists():
        return
    command = [sys.executable, "-c", CONVERT, str(source), script, *arguments, "--outtype", "bf16"]
    subprocess.run([*command, "--outfile", str(out)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="directory made by benchmarks.models")
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--quantize", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", choices=KINDS[1:], default=KINDS[1:], help="beside BF16")
    parser.add_argument("--adapters", type=int, default=0, help="how many to convert: none on experts can be")
    args = parser.parse_args()
    base, folder = args.model / "base", args.model / "gguf"
    folder.mkdir(exist_ok=True)
    dense = folder / f"{KINDS[0]}.gguf"
    convert(args.source, "convert_hf_to_gguf.py", dense, str(base))
    for kind in args.kinds:
        if not (folder / f"{kind}.gguf").exists():
            subprocess.run([args.quantize, dense, folder / f"{kind}.gguf", kind], check=True, stdout=subprocess.DEVNULL)
    for index in range(args.adapters):
        name = f"a{index:02d}"
        adapter = str(args.model / "adapters" / name)
        convert(args.source, "convert_lora_to_gguf.py", folder / f"{name}.gguf", adapter, "--base", str(base))


if __name__ == "__main__":
    main()
