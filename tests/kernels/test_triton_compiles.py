"""What the interpreter cannot say of the kernels: that they compile, and fit into the GPUs they are meant for."""

import json
import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]
# Bytes of one block that a GPU of each capability offers, at most 166912, 101376, 232448, 232448 and 101376. Those of
# 8.6 have 101376 and run what is compiled for 8.0; the tiles are chosen such that all do with that.
SHARED_BYTES = dict.fromkeys((80, 89, 90, 100, 120), 101376)
# Of a thread. Those that only stream leave room for many threads; for the others 255 is what there is.
LOGITS = {"_mask_tail", "_penalise", "_change_tokens", "_raise_green", "_mask_logits"}
STREAMING = {
    "_scale",
    "_add_splits",
    "_round_inputs",
    "_rotary_store_kv",
    "_norm",
    "_activate",
    "_activate_and_mul",
} | LOGITS
REGISTERS = dict.fromkeys(STREAMING, 128)
MOST_REGISTERS = 255
# Bytes of a thread's registers that are put aside. A few outside the loops cost nothing; products of float32 are made
# without tensor cores, for exactness and not for speed.
SPILLED_BYTES = {"bfloat16": 64, "float16": 64, "float32": 640}
KERNELS = {
    "_attention",
    "_decode",
    "_combine",
    "_shrink",
    "_expand",
    "_scale",
    "_quantized_linear",
    "_round_inputs",
    "_integer_linear",
    "_grouped_linear",
    "_add_splits",
    "_rotary_store_kv",
    "_norm",
    "_activate",
    "_activate_and_mul",
}
SAMPLING = LOGITS | {"_draw"}  # of logits, which are float32 whatever the activations are: compiled with bfloat16

if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
    pytest.skip("this build of triton brings no compiler for CUDA", allow_module_level=True)


def case(capability, dtype):
    """One capability with one type. Every run has one, which offers a kernel least: each takes a minute or more."""
    in_every_run = (capability, dtype) == (80, "bfloat16")
    return pytest.param(capability, dtype, marks=pytest.mark.slow if in_every_run else pytest.mark.long)


CASES = [case(capability, dtype) for capability in SHARED_BYTES for dtype in SPILLED_BYTES]


@pytest.fixture(scope="module")
def compilations(request):
    """What becomes of each case that is selected: as many are compiled side by side as there are cores.

    Triton finds again what an earlier run compiled, by a digest of the kernel's source, its options and the compiler.
    """
    name = test_every_kernel_compiles_and_fits.__name__
    params = [item.callspec.params for item in request.session.items if getattr(item, "originalname", "") == name]
    cache = request.config.cache.mkdir("triton")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {(each["capability"], each["dtype"]): pool.submit(compiled, cache, **each) for each in params}


def compiled(cache, capability, dtype):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(SCRIPT), str(capability), dtype]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("capability", "dtype"), CASES)
def test_every_kernel_compiles_and_fits(capability, dtype, compilations):
    result = compilations[capability, dtype].result()
    assert result.returncode == 0, result.stderr
    used = [json.loads(line) for line in result.stdout.splitlines()]
    numbers = Counter(each["kernel"] for each in used)
    assert set(numbers) == (KERNELS | SAMPLING if dtype == "bfloat16" else KERNELS)
    # One for tiles of few rows and one for those of many, whatever the number of segments and the ranks reserved.
    assert numbers["_shrink"] == 2
    for each in used:
        assert each["shared"] <= SHARED_BYTES[capability], each
        assert each["registers"] <= REGISTERS.get(each["kernel"], MOST_REGISTERS), each
        assert each["spilled"] <= SPILLED_BYTES[dtype], each
