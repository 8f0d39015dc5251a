"""What the interpreter cannot say of the kernels: that they compile, and fit into the GPUs they are meant for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
ROOT = SCRIPT.parents[2]
SHARED_BYTES = 101376  # of one block on the smallest of them (capability 8.9); an H200 has 232448
SPILLED_BYTES = 64  # a few registers put aside outside the loops cost nothing

if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
    pytest.skip("this build of triton brings no compiler for CUDA", allow_module_level=True)


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_fits(capability, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), str(capability)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    used = [json.loads(line) for line in result.stdout.splitlines()]
    assert {each["kernel"] for each in used} == {
        "_attention",
        "_combine",
        "_shrink",
        "_expand",
        "_scale",
        "_quantized_linear",
        "_add_splits",
        "_rotary_store_kv",
        "_rms_norm",
        "_activate_and_mul",
    }
    for each in used:
        assert each["shared"] <= SHARED_BYTES, each
        assert each["stack"] <= SPILLED_BYTES, each
